"""The process group in which weights are broadcast: joined, used and left without this process ever being held up."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

_POLL_SECONDS = (0.0005, 0.05)
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class BroadcastGroup:
    """This process as rank 0 and the engines' as the others, over gloo or NCCL.

    What may wait for another member happens in a thread of its own. Neither backend can be relied on to notice that one
    of them is gone: gloo waits for its timeout once a part of a tensor is on its way, NCCL for ever; and the end of
    a gloo group waits for what is under way. So whoever has given a member up turns to `abandon`, and the thread ends
    when it can.

    Args:
        name: of the group, the same for all members and no other group's.
        address: at which the others reach this process.
        size: of the group.
        device: of what is broadcast; NCCL on a GPU, gloo on a CPU.
        join_seconds: how long the others may take to join.
        broadcast_seconds: how long a broadcast may take.
    """

    def __init__(
        self,
        name: str,
        *,
        address: str,
        size: int,
        device: torch.device,
        join_seconds: float,
        broadcast_seconds: float,
    ) -> None:
        self.name, self._size, self._address = name, size, address
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._join_seconds, self._broadcast_seconds = join_seconds, broadcast_seconds
        # It takes a free port itself, so that no other process can take it in between.
        self._server: dist.TCPStore | None = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self._port = self._server.port
        self._taking = threading.Lock()
        self._group: dist.ProcessGroup | None = None
        self._is_over = False

    @property
    def invitation(self) -> dict[str, Any]:
        """What the others are told to join, but for their ranks."""
        return {
            "master_address": self._address,
            "master_port": self._port,
            "world_size": self._size,
            "group_name": self.name,
            "backend": self._backend,
        }

    def join(self) -> Future[None]:
        """Wait for the others to join; the future raises a RuntimeError when they do not."""
        return _in_background(self._join)

    def broadcast(self, flat: torch.Tensor) -> Future[None]:
        """Send a tensor to all members; the future raises a RuntimeError when one of them is known to have failed."""
        group, backend = self._group, self._backend
        assert group is not None, "without a group torch would take that of all ranks"
        return _in_background(lambda: _broadcast(flat, group, backend))

    def leave(self) -> None:
        """Leave a group in which nothing is under way; returns at once, and a second call does nothing."""
        self._end(dist.destroy_process_group)

    def abandon(self) -> None:
        """Leave a broken group, whatever is under way in it; returns at once, and a second call does nothing.

        Members that wait for this one are freed when what is under way has ended, those that still join at once.
        """
        self._end(_abort_process_group if self._backend == "nccl" else dist.destroy_process_group)

    def _end(self, end: Callable[[dist.ProcessGroup], None]) -> None:
        # One caller alone gets the group, for both threads may come: without one torch would end that of all ranks.
        with self._taking:
            self._is_over, self._server = True, None
            holder = [] if self._group is None else [self._group]
            self._group = None
        if not holder:
            return
        if self._backend == "gloo":
            _ended(holder, end)  # only its last reference waits for what is under way
            _in_background(holder.clear)
        else:
            _in_background(lambda: _ended(holder, end))

    def _join(self) -> None:
        # A client of the store, as all members have one: when `abandon` ends the server, none waits there any longer.
        store = dist.TCPStore(
            self._address, self._port, self._size, is_master=False, wait_for_workers=False,
            timeout=datetime.timedelta(seconds=self._join_seconds),
        )  # fmt: skip
        with _errors_are_ours if self._backend == "nccl" else contextlib.nullcontext():
            group, _ = _new_process_group_helper(
                self._size, 0, [], Backend(self._backend), PrefixStore(self.name, store),
                group_name=GroupName(self.name),
                timeout=datetime.timedelta(seconds=self._broadcast_seconds),
            )  # fmt: skip
        assert isinstance(group, dist.ProcessGroup)
        _world.pg_group_ranks[group] = {rank: rank for rank in range(self._size)}
        with self._taking:
            self._group = group
            is_over = self._is_over  # meanwhile
        del group
        if is_over:
            self.abandon()


def _broadcast(flat: torch.Tensor, group: dist.ProcessGroup, backend: str) -> None:
    # NCCL connects its members in the first broadcast, and this call waits for that.
    work = dist.broadcast(flat, src=0, group=group, async_op=True)
    assert work is not None
    if backend == "gloo":
        work.wait()
        return
    # Not wait(): it would queue all that this process computes behind a kernel that may never end.
    pause = _POLL_SECONDS[0]
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS[1])


def _ended(holder: Sequence[dist.ProcessGroup], end: Callable[[dist.ProcessGroup], None]) -> None:
    with contextlib.suppress(RuntimeError, ValueError):
        end(holder[0])


def _in_background(action: Callable[[], object]) -> Future[None]:
    """Do it in a thread that nothing waits for, the end of the process included."""
    future: Future[None] = Future()

    def run() -> None:
        failure: BaseException | None = None
        try:
            action()
        except BaseException as error:
            # Without its traceback: that holds the group, whose connections would stay open as long as it.
            failure = error.with_traceback(None)
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)

    threading.Thread(target=run, name="weight broadcast", daemon=True).start()
    return future


class _ErrorsAreOurs:
    """Inside of it torch leaves the failures of a group that is made to us; else its watchdog ends the process (NCCL).

    Torch reads that from the environment only. Several threads may be inside at once, and the last one to leave puts
    back what was there.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._inside = 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._changing:
            if not self._inside:
                self._before = os.environ.get(_ERROR_HANDLING)
                os.environ[_ERROR_HANDLING] = "0"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._inside -= 1
            if not self._inside:
                os.environ.pop(_ERROR_HANDLING, None)
                if self._before is not None:
                    os.environ[_ERROR_HANDLING] = self._before


_errors_are_ours = _ErrorsAreOurs()
