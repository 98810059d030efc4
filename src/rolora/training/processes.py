"""Processes that work for this one: an executor that replaces those that die, and calls in order.

``deal`` takes any ``concurrent.futures.Executor``; ``Processes`` is the one for this machine.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rolora.errors import RoloraError

T = TypeVar("T")
ATTEMPTS = 3  # processes that may die of one call
AHEAD = 4  # results that may wait for their turn, for each call under way
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_STARTING = threading.Lock()
_log = logging.getLogger(__name__)


def deal(executor: Executor, calls: Iterable[Callable[[], T]], most: int) -> Iterator[T]:
    """The results of the calls, in their order; ``most`` of them are under way at a time.

    A call is taken from ``calls`` when it can begin. When the iterator ends or is closed, no call
    that has not begun will.
    """
    waiting: deque[Future[T]] = deque()
    left = iter(calls)

    def begin() -> None:
        while len(waiting) < AHEAD * most and sum(not one.done() for one in waiting) < most:
            if (call := next(left, None)) is None:
                return
            waiting.append(executor.submit(call))

    try:
        begin()
        while waiting:
            while not waiting[0].done():
                wait([one for one in waiting if not one.done()], return_when=FIRST_COMPLETED)
                begin()
            yield waiting.popleft().result()
            begin()
    finally:
        for one in waiting:
            one.cancel()


class Processes(Executor):
    """``count`` processes of this machine, each started when it is first needed.

    One that dies is replaced, and its call is made again; RoloraError once ``ATTEMPTS`` have died
    of the same call. All end when this process does, however it ends. ``cards``: CUDA's names of
    cards, of which each process sees one, in turn; none: it sees what this process sees.
    """

    def __init__(self, count: int, cards: Sequence[str] = ()) -> None:
        self._cards = cards
        self._threads = ThreadPoolExecutor(count)  # one waits for each process
        self._free: queue.PriorityQueue[int] = queue.PriorityQueue()
        for place in range(count):
            self._free.put(place)
        self._pools: dict[int, tuple[ProcessPoolExecutor, int]] = {}
        self._ended = False
        atexit.register(self.shutdown)  # a run may be abandoned, and later it is too late

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have a process call ``fn``, which has to be importable there, as its arguments have."""
        return self._threads.submit(self._call, partial(fn, *args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes now, also in the middle of a call."""
        if self._ended:
            return
        atexit.unregister(self.shutdown)
        self._ended = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _, pid in list(self._pools.values()):
            _kill(pid)
        self._threads.shutdown(wait=wait)
        for pool, _ in self._pools.values():
            pool.shutdown(wait=wait)
        self._pools.clear()

    def _call(self, call: Callable[[], T]) -> T:
        place = self._free.get()
        try:
            for _ in range(ATTEMPTS):
                with contextlib.suppress(BrokenProcessPool):
                    return self._process(place).submit(call).result()
                if self._ended:
                    raise CancelledError
                _log.warning(
                    "a worker process has died (killed, or out of memory): another takes its "
                    "place, and does its work again"
                )
                self._pools.pop(place)[0].shutdown()
        finally:
            self._free.put(place)
        raise RoloraError(
            f"{ATTEMPTS} worker processes have died one after another at the same work: if memory "
            "ran out, lower train.workers, also when the run is resumed"
        )

    def _process(self, place: int) -> ProcessPoolExecutor:
        """The process of this place, behind an executor of its own: another's death leaves it."""
        if place not in self._pools:
            card = self._cards[place % len(self._cards)] if self._cards else None
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(1, spawn, _begin, (card,))
            self._pools[place] = pool, 0
            with _starting():
                told = pool.submit(os.getpid)
            self._pools[place] = pool, told.result()
            if self._ended:
                _kill(self._pools[place][1])
        return self._pools[place][0]


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Processes started in this block do not run the user's script again, and block signals.

    A new process imports the main module: a script without a ``__main__`` guard would start all
    over, and nothing of ours is in it. Ctrl-C reaches all processes of a terminal, but only the
    first one has to handle it.
    """
    with _STARTING:
        script = sys.modules["__main__"]
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _begin(card: str | None) -> None:
    """The first thing that a process does."""
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card  # read when CUDA is first used
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _kill(pid: int) -> None:
    """Kill this child, if it is still one."""
    for child in multiprocessing.active_children():
        if child.pid == pid:
            child.kill()


def usable_cores() -> int:
    """Processor cores that this process may use, within its container's limit; at least 1."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = Path("/sys/fs/cgroup/cpu.max")  # microseconds in each period, cgroup version 2
    if quota.exists():
        most, period = quota.read_text().split()
        if most.isdecimal():
            cores = min(cores, int(most) // int(period))
    return max(cores, 1)
