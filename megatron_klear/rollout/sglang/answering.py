"""Whether servers answer, asked of all of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import httpx2

from megatron_klear.rollout.sglang.start_report import StartReport

POLL_SECONDS = 0.25
_ANSWER_SECONDS = 5.0
_MOST_THREADS = 64
_SHOWN_URLS = 4
_Server = TypeVar("_Server")

Question = Callable[[httpx2.Client, _Server], bool]


@contextmanager
def asking(most: int) -> Iterator[Callable[[Question[_Server], Sequence[_Server]], list[_Server]]]:
    """Yields `those(question, servers)`: the servers to which the answer is yes.

    They are asked at once, so that those that keep us waiting do not hide what the others say.

    Args:
        most: servers that are asked at once.
    """
    with (
        httpx2.Client(trust_env=False, timeout=_ANSWER_SECONDS) as client,
        ThreadPoolExecutor(max(min(most, _MOST_THREADS), 1), thread_name_prefix="ask servers") as threads,
    ):

        def those(question: Question[_Server], servers: Sequence[_Server]) -> list[_Server]:
            answers = threads.map(partial(question, client), servers)
            return [server for server, is_so in zip(servers, answers, strict=True) if is_so]

        yield those


def wait_until_answering(
    urls: Sequence[str], seconds: float, waiting: Callable[[], None], report: StartReport | None = None
) -> list[str]:
    """Give servers that others start so long to load their model.

    Args:
        urls: of the servers.
        seconds: for all of them together.
        waiting: called while waiting, several times a second.
        report: told how many answer.

    Returns:
        those that do not; whoever asks them next says what is wrong.
    """
    deadline = time.monotonic() + seconds
    left = list(urls)
    with asking(len(urls)) as those:
        while left and time.monotonic() < deadline:
            answering = set(those(is_ready, left))
            left = [url for url in left if url not in answering]
            if report is not None:
                report.note(len(urls) - len(left), f"not yet: {shown(left)}" if left else "")
            if left:
                waiting()
                time.sleep(POLL_SECONDS)
    return left


def is_ready(client: httpx2.Client, url: str) -> bool:
    """Whether the server has loaded its model: it answers HTTP only then."""
    try:
        return client.get(f"{url.rstrip('/')}/model_info").status_code == 200
    except httpx2.HTTPError:
        return False


def shown(urls: Sequence[str]) -> str:
    """URLs in a message that stays short."""
    more = f" and {len(urls) - _SHOWN_URLS} more" if len(urls) > _SHOWN_URLS else ""
    return ", ".join(urls[:_SHOWN_URLS]) + more
