"""The report's HTML: one page with its style sheet, and nothing to fetch from anywhere.

Filled in by jinja2 with autoescaping on, since it shows what a model wrote; only the pictures drawn by
`plots` go in as they are. The content security policy forbids scripts and every fetch besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STYLE = """
:root { color-scheme: light dark;
  --page:#f6f7f9; --card:#ffffff; --ink:#1a1f2b; --muted:#5b6472; --grid:#e4e7ec; --line:#dfe3e9; --soft:#f1f3f6;
  --good:#00704f; --good-soft:#e2f4ec; --bad:#b23224; --bad-soft:#fbe9e6; --odd:#7a3f68; --odd-soft:#f5e9f1;
LIGHT }
@media (prefers-color-scheme: dark) { :root {
  --page:#12151b; --card:#1a1e26; --ink:#e8ebf0; --muted:#9aa4b2; --grid:#2c323d; --line:#2c323d; --soft:#222731;
  --good:#5fd3a9; --good-soft:#16352b; --bad:#ff9585; --bad-soft:#3d211d; --odd:#e3a3cb; --odd-soft:#382333;
DARK } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric:tabular-nums; overflow-wrap:anywhere }
main { max-width:1120px; margin:0 auto; padding:40px 24px 64px }
h1 { font-size:30px; line-height:1.2; letter-spacing:-.015em; margin:0 0 6px }
h2 { font-size:20px; letter-spacing:-.01em; margin:44px 0 14px }
h3 { font-size:15px; margin:0 }
p { margin:0 }
a { color:var(--c0) }
.muted { color:var(--muted) }
.small { font-size:13.5px }
.lede { font-size:18px; margin-top:16px; max-width:46em }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px }
.tiles { display:flex; flex-wrap:wrap; gap:12px; margin-top:24px }
.tile { padding:13px 14px; flex:1 1 158px }
.tile b { display:block; white-space:nowrap; font-size:22px; line-height:1.25; font-weight:650; letter-spacing:-.01em }
.tile small { font-size:13px; font-weight:500; color:var(--muted); letter-spacing:0 }
.tile span { display:block; font-size:13px; color:var(--muted) }
.charts { display:grid; grid-template-columns:repeat(2, minmax(0, 1fr)); gap:14px }
.chart { padding:16px 16px 10px; margin:0; min-width:0; display:flex; flex-direction:column }
.chart.wide { grid-column:1 / -1 }
.panels { display:flex; flex-wrap:wrap; gap:4px 24px; margin-top:auto; padding-top:8px }
.panels svg { display:block; flex:1 1 330px; min-width:0; height:auto; overflow:visible }
.chart figcaption { font-size:13px; color:var(--muted) }
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; margin:6px 0 0; padding:0; list-style:none; font-size:13px }
.legend svg { display:inline-block; width:22px; height:10px; margin-right:6px }
table { border-collapse:collapse; width:100%; font-size:14.5px }
th, td { text-align:left; padding:8px 14px; border-bottom:1px solid var(--line); vertical-align:top }
td:first-child, th { white-space:nowrap }
tr:last-child td { border-bottom:0 }
th { font-weight:600; color:var(--muted); font-size:13px }
td.number, th.number { text-align:right; white-space:nowrap }
.scroll { overflow-x:auto }
.rollout { padding:16px 18px; margin-bottom:14px }
.rollout header { display:flex; flex-wrap:wrap; gap:4px 14px; align-items:baseline; margin-bottom:10px }
.badge { font-size:12.5px; font-weight:650; border-radius:99px; padding:2px 10px; background:var(--odd-soft);
  color:var(--odd) }
.badge.correct { background:var(--good-soft); color:var(--good) }
.badge.wrong { background:var(--bad-soft); color:var(--bad) }
.field { font-size:12.5px; font-weight:600; color:var(--muted); margin:10px 0 3px }
pre { margin:0; white-space:pre-wrap; font:13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; background:var(--soft); border-radius:7px; padding:10px 12px; max-height:26em; overflow:auto }
pre .thinking { color:var(--muted) }
details { padding:12px 16px; margin-bottom:12px }
summary { cursor:pointer; font-weight:600 }
details > *:not(summary) { margin-top:12px }
footer { margin-top:48px }
@media (max-width:760px) { .charts { grid-template-columns:minmax(0, 1fr) } main { padding:24px 14px } }
@media print { body { background:#fff } .card { break-inside:avoid } }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
{% if headline %}<p class="lede">{{ headline }}</p>{% endif %}
{% if tiles %}<div class="tiles">
{% for tile in tiles %}<div class="card tile"><span>{{ tile.label }}</span>
<b>{{ tile.value }} <small>{{ tile.unit }}</small></b>
<span>{{ tile.detail }}</span></div>
{% endfor %}</div>{% endif %}

{% if accuracies %}<h2>Accuracy on held-out problems</h2>
<div class="card scroll"><table>
<thead><tr><th>When</th><th class="number">Step</th><th class="number">Accuracy</th>
<th class="number">Standard error</th><th class="number">Correct / graded answers</th></tr></thead>
<tbody>{% for point in accuracies %}<tr><td>{{ point.label }}</td><td class="number">{{ point.step }}</td>
<td class="number">{{ point.accuracy }}</td><td class="number">{{ point.stderr }}</td>
<td class="number">{{ point.counts }}</td></tr>{% endfor %}</tbody>
</table></div>{% endif %}

{% if charts %}<h2>Curves</h2>
<p class="muted small" style="margin:-8px 0 12px">{% if smoothed %}Faint lines show every step, strong lines a moving
average. {% endif %}{% if several_phases %}Each training phase counts its own steps.{% endif %}</p>
<div class="charts">
{% for chart in charts %}<figure class="card chart{{ ' wide' if chart.wide }}" id="{{ chart.key }}">
<h3>{{ chart.title }}</h3>
<figcaption>{{ chart.note }}{% if chart.not_finite %} Not a finite number: {{ chart.not_finite }} of the values (marked
&times;).{% endif %}</figcaption>
{% if chart.legend %}<ul class="legend">{% for entry in chart.legend %}<li><svg viewBox="0 0 22 10" aria-hidden="true">
{%- if chart.stacked %}<rect width="22" height="10" rx="2" style="fill:var(--c{{ entry.color }})"/>
{%- else %}<path d="M0 5H22" style="fill:none;stroke:var(--c{{ entry.color }});stroke-width:2.5
{%- if entry.dashed %};stroke-dasharray:6 3{% endif %}"/>{% endif -%}
</svg>{{ entry.label }}</li>
{% endfor %}</ul>{% endif %}
<div class="panels">{% for svg in chart.svgs %}{{ svg | safe }}{% endfor %}</div>
</figure>
{% endfor %}</div>
{% else %}<h2>Curves</h2><p class="muted">No metrics were written yet.</p>{% endif %}

{% for section in rollouts %}<h2>{{ section.title }}</h2>
<p class="muted small" style="margin:-8px 0 12px">{{ section.note }}</p>
{% for item in section.examples %}<article class="card rollout">
<header><span class="badge {{ item.outcome }}">{{ item.outcome }}</span>
<span class="small">reward {{ item.reward }}</span>
<span class="small muted">step {{ item.step }}</span>
<span class="small muted">problem {{ item.prompt_id }}</span>
<span class="small muted">{{ item.ending }}</span></header>
<div class="field">Problem</div><pre>{{ item.prompt }}</pre>
<div class="field">Response</div>
<pre>{% if item.thinking %}<span class="thinking">{{ item.thinking }}</span>{% endif %}{{ item.answer }}</pre>
<div class="field">Reference</div><pre>{{ item.reference }}</pre>
{% if item.reason %}<p class="small muted" style="margin-top:10px">Grader: {{ item.reason }}</p>{% endif %}
</article>
{% endfor %}{% endfor %}

<h2>Settings and numbers</h2>
{% for file in settings %}<details class="card"><summary>Settings: {{ file.name }}</summary>
<p class="small">The file itself: <a href="{{ file.link }}">{{ file.link }}</a></p><pre>{{ file.text }}</pre></details>
{% else %}<p class="muted" style="margin-bottom:12px">The run directory holds no config.yaml.</p>{% endfor %}
{% for table in numbers %}<details class="card"><summary>Last values of every metric: {{ table.title }}</summary>
<div class="scroll"><table><thead><tr><th>Name</th><th class="number">Step</th><th class="number">Value</th>
<th>Unit</th><th>Meaning</th></tr></thead>
<tbody>{% for row in table.rows %}<tr><td>{{ row.name }}</td><td class="number">{{ row.step }}</td>
<td class="number">{{ row.value }}</td><td>{{ row.unit }}</td><td>{{ row.meaning }}</td></tr>{% endfor %}</tbody>
</table></div></details>
{% endfor %}
<footer class="muted small">{{ footer }}</footer>
</main>
</body>
</html>
"""


def style_sheet(light: tuple[str, ...], dark: tuple[str, ...]) -> str:
    """The style sheet with the curve colours `--c0`, `--c1`, ... for light and dark pages."""
    spelled = [" ".join(f"--c{i}:{color};" for i, color in enumerate(palette)) for palette in (light, dark)]
    return STYLE.replace("LIGHT", spelled[0], 1).replace("DARK", spelled[1], 1)


_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0xD800, 0xE000), 0x202D, 0x202E), 0xFFFD),
}
"""Unicode's pictures of control characters, and what stands for halves of surrogate pairs: HTML may hold neither. The
two characters that turn the direction of everything after them would have a page show what nobody wrote."""


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Fill in a page's template by jinja2, escaping everything that is not marked safe.

    Control characters become visible: a NUL is shown as its picture.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    return environment.from_string(template).render(values)


def _visible(value: Any) -> Any:
    # What is marked safe is of a class of its own, and stays that.
    return value.translate(_PICTURES) if type(value) is str else value
