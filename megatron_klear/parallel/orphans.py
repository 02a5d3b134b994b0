"""Ends helper processes whose parent is gone: a kill gives the parent no time to end them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(*, at_once: bool = False) -> None:
    """Watch, in a thread, that the process which started this one lives, and end this one when it does not.

    Args:
        at_once: have Linux end this process in the moment in which its parent does, for work on files that the
            parent's successor writes, too. The thread that started this process must live as long as its process:
            Linux ends this one when that thread ends.
    """
    if at_once and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(os.getppid(),), name="end with parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
