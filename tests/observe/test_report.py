"""The report: parsed as HTML, for runs of every shape, with text that a hostile model might write."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_klear.observe import names
from megatron_klear.observe.__main__ import main
from megatron_klear.observe.examples import append_examples
from megatron_klear.observe.metrics import MetricsWriter
from megatron_klear.observe.page import fill
from megatron_klear.observe.report import find_sft_run, write_report

VOID = {"meta", "br", "img", "link", "hr", "input"}
HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> \"&amp;{{ 7*7 }}"


class Page(HTMLParser):
    """Reads a page; fails on tags that do not match, remembers what a test asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.texts: dict[str, list[str]] = {}
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.note(tag, attrs)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def note(self, tag, attrs) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids[value] += 1
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_data(self, data) -> None:
        # Text counts for every element around it: a pre holds the text of the spans inside.
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag: str = "body") -> str:
        return "".join(self.texts.get(tag, []))


def rl_values(step: int, rng: np.random.Generator) -> dict[str, float]:
    values = {name: abs(float(rng.normal())) for name in names.METRICS if not name.startswith("accuracy/heldout")}
    values |= {names.phase_seconds(name): float(rng.random()) for name in ("generate", "grade", "train")}
    values[names.ACCURACY_TRAIN] = min(0.4 + step / 100, 1.0)
    return values


def write_rl(run_dir: Path, steps: int, *, full: bool = False) -> Path:
    rng = np.random.default_rng(0)
    with MetricsWriter(run_dir, tensorboard=False, resume_step=None) as metrics:
        for step in range(steps + 1):
            if step in (0, steps):
                heldout = {names.ACCURACY_HELDOUT: 0.4 + 0.3 * step / steps, names.ACCURACY_HELDOUT_COUNT: 400}
                metrics.log(step, "eval", heldout)
            if step:
                metrics.log(step, "rl", rl_values(step, rng) if full else {names.REWARD_MEAN: step / steps})
    return run_dir


def write_sft(run_dir: Path, steps: int) -> Path:
    with MetricsWriter(run_dir, tensorboard=False, resume_step=None) as metrics:
        metrics.log(0, "eval", {names.ACCURACY_HELDOUT: 0.0, names.ACCURACY_HELDOUT_COUNT: 400})
        for step in range(1, steps + 1):
            metrics.log(step, "sft", {names.LOSS_TOTAL: 3 / step, names.OPTIMIZER_GRAD_NORM: 1.0})
        metrics.log(steps, "eval", {names.ACCURACY_HELDOUT: 0.4, names.ACCURACY_HELDOUT_COUNT: 400})
    return run_dir


def example(**changes) -> dict:
    row = {
        "step": 1, "prompt_id": "sum/1", "prompt": "1 + 1?", "reference": "2", "response": "<think>\nhm\n</think>\n2",
        "outcome": "correct", "reward": 1.0, "reason": "equal", "finish_reason": "stop",
    }  # fmt: skip
    return {**row, **changes}


def assert_self_contained(page: Page) -> None:
    assert page.tags["script"] == 0
    assert not any(name.startswith("on") for name in page.attributes)
    outside = [
        link for link in page.links if not link.startswith("#") and not re.fullmatch(r"[\w./-]*config\.yaml", link)
    ]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert max(page.ids.values(), default=1) == 1
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)\)", page.source)
    )
    assert targets <= set(page.ids)


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_a_full_run_shows_every_curve_the_accuracy_and_the_rollouts(tmp_path: Path) -> None:
    run_dir = write_rl(tmp_path / "rl", 40, full=True)
    (run_dir / "config.yaml").write_text("rl:\n  steps: 40  # <b>\n")
    append_examples(run_dir, [example(), example(outcome="wrong", response="3", prompt_id="sum/2")])
    page = Page(write_report(run_dir))
    assert_self_contained(page)
    titles = page.text("h3")
    for title in (
        "Accuracy", "Loss", "Reward", "Response length", "Entropy", "Tokens outside the trust region",
        "Gradient mass outside the trust region", "KL of rollout and trainer policy", "Grades", "Gradient norm",
        "Throughput", "Where the time goes", "Peak memory", "Learning rate", "Zero-advantage filter",
    ):  # fmt: skip
        assert title in titles
    for region in ("low", "high"):
        for sign in (">", "<"):
            assert f"ratio {region}, advantage {sign} 0" in page.text("li")
    cells = re.sub(r"\s+", " ", page.text("td"))
    assert "Before RL" in page.text("td")
    assert "280 / 400" in cells
    assert "config.yaml" in page.links
    assert "steps: 40  # <b>" in page.text("pre")
    width, height = png_size(run_dir / "report.png")
    assert width > 1500
    assert height > 1000
    assert not list(run_dir.glob(".*part"))


def test_the_headline_is_the_difference_with_its_standard_error(tmp_path: Path) -> None:
    page = Page(write_report(write_rl(tmp_path, 20)))
    error = math.sqrt(0.4 * 0.6 / 400 + 0.7 * 0.3 / 400)
    assert f"RL raised held-out accuracy from 0.400 to 0.700 (+0.300 ± {error:.3f}, 400 answers)." in page.text("p")


def test_a_change_within_the_uncertainty_is_not_called_a_gain(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        for step, accuracy in ((0, 0.50), (5, 0.52)):
            metrics.log(step, "rl", {names.REWARD_MEAN: accuracy})
            metrics.log(step, "eval", {names.ACCURACY_HELDOUT: accuracy, names.ACCURACY_HELDOUT_COUNT: 100})
    assert "RL did not change held-out accuracy beyond the uncertainty" in Page(write_report(tmp_path)).text("p")


def test_what_a_model_writes_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    hostile = dict.fromkeys(("prompt_id", "prompt", "reference", "response", "reason"), HOSTILE)
    (tmp_path / "config.yaml").write_text(HOSTILE)
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.log(1, "rl", {f"own/{HOSTILE}": 1.0, f"phase_seconds/{HOSTILE}": 1.0})
    append_examples(tmp_path, [example(**hostile), example(**hostile, outcome="wrong", finish_reason=HOSTILE)])
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    assert page.tags["img"] == 0
    assert page.text("pre").count(HOSTILE) == 2 * 3 + 1
    assert page.text("header").count(HOSTILE) == 3
    assert "49" not in page.text("article")


def test_thinking_is_set_apart_from_the_answer(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, tensorboard=False, resume_step=None).close()
    append_examples(tmp_path, [example(response="<think>\na < b\n</think>\nso 2")])
    source = write_report(tmp_path).read_text()
    assert '<span class="thinking">&lt;think&gt;\na &lt; b\n&lt;/think&gt;</span>\nso 2</pre>' in source


def test_very_long_texts_lose_their_middle(tmp_path: Path) -> None:
    append_examples(tmp_path, [example(response="a" * 40_000 + "b" * 40_000)])
    text = Page(write_report(tmp_path)).text("pre")
    assert text.count("a") > 14_000
    assert text.count("b") > 14_000
    assert "50,000 characters left out" in text


def test_rollouts_are_the_latest_of_different_problems_and_ways_of_failing(tmp_path: Path) -> None:
    rows = []
    for step in range(1, 11):
        rows += [example(step=step, prompt_id=f"p{step}-{i}", response=f"right {step}") for i in (0, 0, 1)]
        rows += [example(step=step, prompt_id=f"w{step}", outcome="wrong", response=f"wrong {step}")]
    rows.insert(4, example(step=1, prompt_id="m", outcome="malformed", response="no end"))
    rows.append(example(step=10, prompt_id="u", outcome="ungraded", response="nobody knows"))
    append_examples(tmp_path, rows)
    page = Page(write_report(tmp_path))
    shown = re.findall(r"step(\d+)problem(\S+?)endedby", re.sub(r"\s", "", page.text("header")))
    assert shown[:3] == [("10", "p10-1"), ("10", "p10-0"), ("9", "p9-1")]
    assert sorted(shown[3:6]) == [("1", "m"), ("10", "w10"), ("9", "w9")]
    assert shown[6:] == [("1", "p1-0"), ("1", "w1")]
    assert "nobody knows" not in page.text()


@pytest.mark.parametrize("steps", [1, 2, 30, 1500])
def test_runs_of_any_length(tmp_path, steps) -> None:
    page = Page(write_report(write_sft(tmp_path, steps)))
    assert_self_contained(page)
    assert page.tags["figure"] == 3
    assert "BeforeSFT0" in re.sub(r"\s", "", page.text("td"))
    assert len(page.source) < 300_000


def test_one_rl_step_draws_every_chart(tmp_path: Path) -> None:
    page = Page(write_report(write_rl(tmp_path, 1, full=True)))
    assert_self_contained(page)
    assert page.tags["figure"] >= 15


def test_a_run_without_anything_still_gets_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "empty"))
    assert_self_contained(page)
    assert "No metrics were written yet." in page.text()
    assert png_size(tmp_path / "empty" / "report.png")[0] > 300


def test_only_values_that_are_not_finite(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        for step in range(1, 4):
            metrics.log(step, "rl", dict.fromkeys(names.METRICS, math.nan) | {names.phase_seconds("train"): math.inf})
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    assert "Not a finite number: 3 of the values" in page.text("figcaption")


def test_both_phases_stand_side_by_side(tmp_path: Path) -> None:
    sft, rl = write_sft(tmp_path / "sft", 12), write_rl(tmp_path / "rl", 12)
    page = Page(write_report(rl, sft))
    assert "SFT and RL report" in page.text("h1")
    assert re.sub(r"\s+", " ", page.text("td")).count("After SFT") == 1
    # RL starts where SFT ended, with the same accuracy and count: told once.
    assert "Before RL" not in page.text("td")
    assert "RL raised held-out accuracy from 0.400 to 0.700" in page.text("p")


def test_both_phases_in_one_directory(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        for phase in ("sft", "rl"):
            for step in range(1, 4):
                metrics.log(step, phase, {names.LOSS_TOTAL: 1.0})
            accuracy = 0.2 if phase == "sft" else 0.6
            metrics.log(3, "eval", {names.ACCURACY_HELDOUT: accuracy, names.ACCURACY_HELDOUT_COUNT: 1000})
    page = Page(write_report(tmp_path))
    assert "RL raised held-out accuracy from 0.200 to 0.600" in page.text("p")


def test_the_sft_run_is_found_through_the_settings(tmp_path: Path) -> None:
    sft, rl = write_sft(tmp_path / "sft", 3), write_rl(tmp_path / "rl", 3)
    assert find_sft_run(rl) is None
    (rl / "config.yaml").write_text(f"run:\n  dir: {rl}\nmodel:\n  hf_dir: {sft}/export/hf\n  list: [1, null, 'a b']\n")
    assert find_sft_run(rl) == sft
    assert "SFT and RL report" in Page(write_report(rl)).text("h1")
    (rl / "config.yaml").write_text("run: [unclosed\n")
    assert find_sft_run(rl) is None


def test_the_command_writes_a_report_and_refuses_what_is_no_directory(tmp_path, capsys) -> None:
    write_sft(tmp_path, 2)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert main([str(tmp_path / "missing")]) == 2
    assert "missing is not a directory" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert main([str(tmp_path / "other")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir())


def test_characters_that_no_page_may_hold_become_visible() -> None:
    shown = fill(
        "{{ text }}|{{ raw | safe }}|{{ number }}",
        {"text": "a\0\x1b\t\n\x7f\ud800\u202e<", "raw": "<i>\0</i>", "number": 1},
    )
    assert shown == "a\u2400\u241b\t\n\u2421\ufffd\ufffd&lt;|<i>\0</i>|1"
