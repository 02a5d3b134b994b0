"""`python -m megatron_klear.verify --rewards CONFIG`: read what the settings name, judge it, print a table."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_klear.config import Settings, load_settings
from megatron_klear.data.jsonl import read_objects
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import DOMAINS
from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, ConfigError, DataError, RewardError
from megatron_klear.records import FinishReason, Outcome
from megatron_klear.reward.probes import Probe
from megatron_klear.rollout.ledger import GroupFilter, LedgerReader
from megatron_klear.session.answer_keys import AnswerKeys, survey
from megatron_klear.session.grading import Graders, require_sandbox
from megatron_klear.session.reward_lint import LintRow, key_rows, lint_rewards
from megatron_klear.session.tokenizer import run_tokenizer

_SECTIONS = ("reward.", "code_reward.")


def lint_command(
    config: str,
    overrides: Sequence[str],
    console: Console,
    *,
    probes: str | None = None,
    max_ungraded: float = 0.01,
    max_rows: int = 1000,
) -> int:
    """Judge the rewards of a run's settings; returns the exit status.

    Args:
        config: settings of `train_rl`.
        overrides: `section.field=value` texts.
        console: to print the table on.
        probes: file of further probes, rows {"domain", "response", "reference", "expected": outcome or outcomes,
            "name"?, "finish_reason"?}; a response that does not open its thinking begins where the model does.
        max_ungraded: largest share of ungraded answer keys.
        max_rows: most problems to grade, taken evenly from all files.
    """
    try:
        settings = load_settings(config, overrides, entry="rl", world_size=int(os.environ.get("WORLD_SIZE", "1")))
        with AnswerKeys(max_rows) as keys:
            survey(settings, keys)
        more = _read_probes(probes) if probes else []
        chat = run_tokenizer(settings)
        if "code" in keys.domains or any(probe.domain == "code" for probe in more):
            require_sandbox(settings)
    except ConfigError as error:
        rewards = [text for text in error.problems if text.startswith(_SECTIONS)]
        if len(rewards) == len(error.problems):
            # What the settings themselves refuse is what this command is asked to find.
            faults = [LintRow(check=text.split(":")[0], found=text.split(": ", 1)[1], passed=False) for text in rewards]
            return _show(console, faults, "settings refused")
        print(
            "\n".join(["verify: the settings cannot be used:", *(f"  - {t}" for t in error.problems)]), file=sys.stderr
        )
        return EXIT_BAD_INPUT
    except DataError as error:
        print(f"verify: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    rows = keys.sample()
    graders = Graders(settings)
    try:
        found = lint_rewards(settings, rows, graders, chat, probes=more, max_ungraded=max_ungraded)
    except RewardError as error:
        print(f"verify: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        graders.close()
    found = [*found, *key_rows(keys), *_recorded(settings, max_ungraded)]
    return _show(console, found, f"{len(rows)} of {keys.rows} problems graded")


def _recorded(settings: Settings, max_ungraded: float) -> list[LintRow]:
    """The share of ungraded responses in the ledger of the run, where it has begun."""
    file = Path(settings.run.dir) / "ledger.sqlite"
    if not file.is_file():
        return []
    with LedgerReader(file) as reader:
        outcomes = [row.outcome for row in reader.response_rows(GroupFilter()) if row.outcome is not None]
    share = outcomes.count("ungraded") / max(len(outcomes), 1)
    return [
        LintRow(
            check=f"recorded: at most {max_ungraded:.1%} of the responses are ungraded",
            found=f"{share:.1%} of {len(outcomes)} in {file}",
            passed=share <= max_ungraded,
        )
    ]


def _read_probes(file: str) -> list[Probe]:
    """Probes of a file.

    Raises:
        DataError: naming line and field of everything that is wrong.
    """
    problems = Problems("the probes")
    probes = []
    for where, value in read_objects([file], problems, setting="--probes"):
        faults = list(_probe_faults(value))
        for fault in faults:
            problems.add(where, fault)
        if not faults:
            expected: list[Any] = [value["expected"]] if isinstance(value["expected"], str) else value["expected"]
            name, finish = str(value.get("name", where)), value.get("finish_reason", "stop")
            probes.append(
                Probe(name, value["domain"], value["response"], _text(value["reference"]), tuple(expected), finish)
            )
    problems.raise_if_any()
    return probes


def _probe_faults(value: dict[str, Any]) -> list[str]:
    outcomes, finishes = get_args(Outcome), get_args(FinishReason)
    expected = value.get("expected")
    expected = [expected] if isinstance(expected, str) else expected
    faults = []
    if value.get("domain") not in DOMAINS:
        faults.append(f"domain must be one of {', '.join(DOMAINS)}, got {json.dumps(value.get('domain'))}")
    if not isinstance(value.get("response"), str):
        faults.append("response must be a string")
    if not isinstance(value.get("reference"), (str, dict)):
        faults.append("reference must be a string, or the tests of a code problem")
    if not isinstance(expected, list) or not expected or not all(one in outcomes for one in expected):
        faults.append(f"expected must be one or more of {', '.join(outcomes)}, got {json.dumps(value.get('expected'))}")
    if value.get("finish_reason", "stop") not in finishes:
        faults.append(f"finish_reason must be one of {', '.join(finishes)}")
    return faults


def _text(reference: str | dict[str, Any]) -> str:
    return reference if isinstance(reference, str) else json.dumps(reference)


def _show(console: Console, rows: Sequence[LintRow], about: str) -> int:
    plain = not console.is_terminal
    table = Table(title=f"Rewards, {about}", title_justify="left", box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    table.add_column("what must hold", overflow="fold")
    table.add_column("what was found", overflow="fold")
    table.add_column("result", justify="right", no_wrap=True)
    for row in rows:
        result = Text("pass", "green") if row.passed else Text("FAIL", "bold red")
        table.add_row(Text(row.check), Text(row.found), result)
    console.print(table)
    passed = sum(row.passed for row in rows)
    console.print(f"verify: {passed} of {len(rows)} checks of the rewards passed", markup=False, highlight=False)
    return EXIT_DONE if passed == len(rows) else EXIT_FAILED
