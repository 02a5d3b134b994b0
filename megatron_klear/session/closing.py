"""The end of a stopped or failed run: told before engines are closed, and that is not waited for without limit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_klear.session.launch import note_status, status_of

log = logging.getLogger(__name__)

STOPPED_SECONDS = 12.0
"""How long engines and graders of a run that was stopped or failed may take to close.

torchrun kills ranks 30 s after the first one has ended; before that the rollout manager takes up to ten."""


@contextmanager
def told_at_once() -> Iterator[None]:
    """Inside of everything that takes long to close: what ends the run is told to whoever started it before that.

    What a step leaves is on disk by then: it is stopped only after a save.
    """
    try:
        yield
    except BaseException as error:
        note_status(status_of(error))
        raise


def closed_within(seconds: float, **closings: Callable[[], object]) -> None:
    """Close several things at once; those that take too long are left to the end of the process.

    Args:
        seconds: for all of them.
        closings: by the name that a message gives them; what one of them raises is logged, as the run's own end is
            what counts.
    """

    def close(name: str, closing: Callable[[], object]) -> None:
        try:
            closing()
        except Exception:
            log.exception("closing the %s", name)

    threads = {
        n: threading.Thread(target=close, args=(n, c), name=f"close {n}", daemon=True) for n, c in closings.items()
    }
    deadline = time.monotonic() + seconds
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("the %s did not close within %.0f s, and end with the process", name, seconds)
