"""What a run has generated, prompt by prompt; also while it runs.

python -m megatron_klear.rollouts RUN_DIR list|show|export|events|check ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, DataError, KlearError
from megatron_klear.records import Domain, Outcome
from megatron_klear.rollout.ledger import (
    EVENTS,
    LEDGER_FILE,
    STATES,
    GroupFilter,
    LedgerReader,
    ResponseRow,
    StoredGroup,
)

_ABOUT = """\
Look into a run's rollout ledger: every prompt group that was reserved, how far it has come, its responses with their
grades, lengths and the versions of the weights that sampled them. It only reads, and may be used while the run goes on,
on the machine of the run's first rank; when the run has ended, on any that sees the directory.

A group goes through these states:
  reserved    its responses are being generated
  generated   all responses are there
  graded      every response has a grade
  committed   promised to a step of training
  trained     the step has been trained
"""
_EXAMPLES = """\
examples (RUN is a run directory):
  python -m megatron_klear.rollouts RUN list                               the newest groups
  python -m megatron_klear.rollouts RUN list --state reserved              what is being generated
  python -m megatron_klear.rollouts RUN list --step 12 --responses         every response of step 12
  python -m megatron_klear.rollouts RUN list --outcome ungraded --responses    where the grader failed, and why
  python -m megatron_klear.rollouts RUN list --min-tokens 20000            groups with long responses
  python -m megatron_klear.rollouts RUN show aime-7                        prompt and responses as text
  python -m megatron_klear.rollouts RUN export good.jsonl --outcome correct --min-reward 1
  python -m megatron_klear.rollouts RUN export all.parquet --tokens        with token ids and logprobs
  python -m megatron_klear.rollouts RUN events --event "drawn again"       which responses were thrown away, and why
  python -m megatron_klear.rollouts RUN events --prompt-id aime-7          all that happened to a prompt
  python -m megatron_klear.rollouts RUN check                              was every prompt trained exactly once?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        if not options.run_dir.is_dir():
            raise DataError(f"RUN_DIR: {options.run_dir} is not a directory; name the run directory (run.dir)")
        with LedgerReader(options.run_dir / LEDGER_FILE) as reader:
            return int(options.action(reader, options))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
    except KlearError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_DONE


def _list(reader: LedgerReader, options: argparse.Namespace) -> int:
    from megatron_klear.observe.console import make_console
    from megatron_klear.rollout.ledger.showing import print_groups, print_responses

    console = make_console(sys.stdout)
    chosen = _chosen(options)
    limit = options.limit
    if options.responses:
        responses = list(reader.response_rows(chosen, _one_more(limit), newest_first=True))
        print_responses(console, responses, limit, grading=options.outcome is not None)
    else:
        with reader.snapshot():
            groups, states = reader.group_rows(chosen, _one_more(limit)), reader.states()
        print_groups(console, groups, states, limit)
    return EXIT_DONE


def _show(reader: LedgerReader, options: argparse.Namespace) -> int:
    from megatron_klear.observe.console import make_console
    from megatron_klear.rollout.ledger.showing import print_group
    from megatron_klear.rollout.ledger.text import run_decoder

    with reader.snapshot():
        rows = reader.group_rows(GroupFilter(whole_id=options.prompt_id, epoch=options.epoch), limit=1)
        if not rows:
            known = ", ".join(row.prompt_id for row in reader.group_rows(GroupFilter(), limit=5)) or "none"
            raise DataError(f"PROMPT_ID: no group of prompt {options.prompt_id}; some that there are: {known}")
        group = reader.load(rows[0].group_id)
        assert group is not None
        responses = list(reader.response_rows(GroupFilter(whole_id=options.prompt_id, epoch=group.epoch)))
    if options.response is not None:
        responses = [_response(group, responses, options.response)]
    decode = None if options.ids else run_decoder(options.run_dir)
    print_group(make_console(sys.stdout), group, responses, decode)
    return EXIT_DONE


def _response(group: StoredGroup, responses: Sequence[ResponseRow], index: int) -> ResponseRow:
    for row in responses:
        if row.response_index == index:
            return row
    name = f"prompt {group.prompt.prompt_id}, epoch {group.epoch}"
    if 0 <= index < group.num_responses:
        raise DataError(f"--response: response {index} of {name} has no tokens yet")
    raise DataError(f"--response: {name} has responses 0 to {group.num_responses - 1}, and no {index}")


def _export(reader: LedgerReader, options: argparse.Namespace) -> int:
    from megatron_klear.rollout.ledger.export import export
    from megatron_klear.rollout.ledger.text import run_decoder

    decode = run_decoder(options.run_dir)
    if decode is None:
        print("no text: the tokenizer that config.yaml names cannot be read; --tokens writes ids", file=sys.stderr)
    with reader.snapshot():
        count = export(reader, _chosen(options), options.out, decode, tokens=options.tokens)
    print(f"{count} responses written to {options.out}")
    return EXIT_DONE


def _events(reader: LedgerReader, options: argparse.Namespace) -> int:
    from megatron_klear.observe.console import make_console
    from megatron_klear.rollout.ledger.history import print_events

    rows = reader.event_rows(options.prompt_id, options.event, _one_more(options.limit))
    print_events(make_console(sys.stdout), rows, options.limit)
    return EXIT_DONE


def _check(reader: LedgerReader, options: argparse.Namespace) -> int:
    from megatron_klear.observe.console import make_console
    from megatron_klear.rollout.ledger.history import print_check

    with reader.snapshot():
        states, wrong = reader.states(), reader.trained_not_once()
        trained, promised = reader.steps("trained"), reader.steps("committed")
    print_check(make_console(sys.stdout), states, trained, promised, wrong)
    return EXIT_FAILED if wrong else EXIT_DONE


def _one_more(limit: int) -> int:
    """How many lines to ask for, so that a line too many tells that not all are shown."""
    return limit + 1 if limit >= 0 else limit


def _chosen(options: argparse.Namespace) -> GroupFilter:
    names = GroupFilter.__dataclass_fields__.keys() & vars(options).keys()
    return GroupFilter(**{name: getattr(options, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_klear.rollouts", description=_ABOUT, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run directory; it holds ledger.sqlite")
    actions = parser.add_subparsers(required=True, metavar="list|show|export|events|check")

    listing = actions.add_parser("list", help="a table of groups, or with --responses of responses")
    listing.add_argument("--responses", action="store_true", help="one line per response")
    listing.add_argument(
        "--limit", type=int, default=40, metavar="N", help="most lines, newest groups first (40; -1: all)"
    )
    listing.set_defaults(action=_list)

    showing = actions.add_parser("show", help="one group with the text of its responses")
    showing.add_argument("prompt_id", metavar="PROMPT_ID")
    showing.add_argument("--epoch", type=int, metavar="N", help="pass over the data, from 0; by default the newest")
    showing.add_argument("--response", type=int, metavar="I", help="only this response, from 0")
    showing.add_argument("--ids", action="store_true", help="token ids in place of text")
    showing.set_defaults(action=_show)

    exporting = actions.add_parser("export", help="responses as JSON lines or Parquet")
    exporting.add_argument("out", metavar="OUT", type=Path, help="a file name ending in .jsonl or .parquet")
    exporting.add_argument("--tokens", action="store_true", help="also token ids and logprobs")
    exporting.set_defaults(action=_export)

    history = actions.add_parser("events", help="the history: trained, rolled back, drawn again and why, resumed, ...")
    history.add_argument("--prompt-id", metavar="ID", help="of this prompt; %% stands for any text")
    history.add_argument("--event", choices=EVENTS, metavar="NAME", help=f"one of: {', '.join(EVENTS)}")
    history.add_argument("--limit", type=int, default=40, metavar="N", help="most lines, newest first (40; -1: all)")
    history.set_defaults(action=_events)

    checking = actions.add_parser(
        "check", help="whether every trained group was trained once; exit status 1 where one was not"
    )
    checking.set_defaults(action=_check)

    for command in (listing, exporting):
        _add_filters(command)
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    filters = parser.add_argument_group("which responses", "all conditions must hold")
    filters.add_argument("--state", choices=STATES, help="of the group")
    filters.add_argument("--step", type=int, metavar="N", help="committed to or trained in this step")
    filters.add_argument("--epoch", type=int, metavar="N", help="pass over the data, from 0")
    filters.add_argument("--outcome", choices=get_args(Outcome), help="what the grader said")
    filters.add_argument("--min-reward", type=float, metavar="X", help="reward of at least X (graded responses)")
    filters.add_argument("--max-reward", type=float, metavar="X", help="reward of at most X (graded responses)")
    filters.add_argument("--min-tokens", type=int, metavar="N", help="at least N tokens")
    filters.add_argument("--max-tokens", type=int, metavar="N", help="at most N tokens")
    filters.add_argument("--version", type=int, metavar="V", help="some of its tokens are from weights of version V")
    filters.add_argument("--domain", choices=get_args(Domain), help="of the prompt")
    filters.add_argument("--prompt-id", metavar="ID", help="of this prompt; %% stands for any text")


if __name__ == "__main__":
    sys.exit(main())
