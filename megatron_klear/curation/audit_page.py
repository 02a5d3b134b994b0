"""The audit's HTML, in the style of a run's report: no scripts, nothing to fetch, all but our pictures escaped."""

from __future__ import annotations

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>{{ style }}
.reasons td:nth-child(2) { white-space:nowrap }
.keys td:first-child { white-space:normal; overflow-wrap:anywhere; width:99% }
.charts, .pair { align-items:start }
.pair { display:grid; grid-template-columns:repeat(2, minmax(0, 1fr)); gap:14px; margin-top:14px }
.pair h3, .stage h3 { padding:14px 14px 4px }
.stage { margin-bottom:14px }
@media (max-width:760px) { .pair { grid-template-columns:minmax(0, 1fr) } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
<div class="tiles">
{% for tile in tiles %}<div class="card tile"><span>{{ tile.label }}</span>
<b>{{ tile.value }} <small>{{ tile.unit }}</small></b>
<span>{{ tile.detail }}</span></div>
{% endfor %}</div>

<h2>Stages</h2>
<div class="card scroll"><table>
<thead><tr><th>Stage</th><th class="number">Rows in</th><th class="number">Rows out</th><th class="number">Work</th>
<th class="number">Speed</th></tr></thead>
<tbody>{% for stage in stages %}<tr><td><a href="#stage-{{ stage.name }}">{{ stage.title }}</a></td>
<td class="number">{{ stage.rows_in }}</td><td class="number">{{ stage.rows_out }}</td>
<td class="number">{{ stage.seconds }}</td><td class="number">{{ stage.rate }}</td></tr>{% endfor %}</tbody>
</table></div>

<h2>Pictures</h2>
<div class="charts">
{% for chart in charts %}<figure class="card chart{{ ' wide' if chart.wide }}" id="{{ chart.key }}">
<h3>{{ chart.title }}</h3>
<figcaption>{{ chart.note }}</figcaption>
<div class="panels">{{ chart.svg | safe }}</div>
</figure>
{% endfor %}</div>

{% for stage in stages %}{% if stage.reasons or stage.tables or stage.examples %}
<h2 id="stage-{{ stage.name }}">{{ stage.title }}</h2>
{% if stage.reasons %}<div class="card scroll stage"><table class="reasons">
<thead><tr><th>Reason</th><th></th><th class="number">Rows</th></tr></thead>
<tbody>{% for row in stage.reasons %}<tr><td>{{ row.reason }}</td><td class="muted">{{ row.kind }}</td>
<td class="number">{{ row.count }}</td></tr>{% endfor %}</tbody></table></div>{% endif %}
{% if stage.tables %}<div class="pair">
{% for table in stage.tables %}<div class="card scroll"><h3>{{ table.title }}</h3><table class="keys">
<tbody>{% for row in table.rows %}<tr><td>{{ row.key }}</td><td class="number">{{ row.count }}</td></tr>{% endfor %}
</tbody></table>{% if table.more %}<p class="muted small" style="padding:6px 14px 12px">and {{ table.more }} more in
audit.json</p>{% endif %}</div>
{% endfor %}</div>{% endif %}
{% for group in stage.examples %}<details class="card" style="margin-top:14px">
<summary>Examples: {{ group.reason }}</summary>
{% for row in group.rows %}<div class="field"><bdi>{{ row.id }}</bdi>
{%- if row.detail %} &middot; <bdi>{{ row.detail }}</bdi>{% endif %}</div>
<pre>{{ row.text }}</pre>{% endfor %}</details>
{% endfor %}{% else %}<span id="stage-{{ stage.name }}"></span>{% endif %}{% endfor %}

<h2>Settings</h2>
<details class="card"><summary>config.yaml</summary><pre>{{ settings }}</pre></details>
<footer class="muted small">{{ footer }}</footer>
</main>
</body>
</html>
"""
