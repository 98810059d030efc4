"""What a process and everything it has started cost: CPU time and anonymous memory (Linux)."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """CPU seconds (user + system) since the watch began; peak anonymous KiB while it lasted."""

    cpu_seconds: float
    peak_kib: int


class Watch:
    """Follows a process tree from ``__enter__`` to ``__exit__``, looking five times a second.

    A process that ends between two looks loses what it did since the last one, so at most 0.2 s
    each; the processes measured here live through a whole measurement. Memory is RssAnon: neither
    files nor shared memory count.
    """

    def __init__(self, pid: int, every: float = 0.2) -> None:
        self.pid = pid
        self.every = every
        self.cost = Cost(0.0, 0)

    def __enter__(self) -> Watch:
        self._before = cpu_ticks(self.pid)
        self._latest = dict(self._before)
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._stop.set()
        self._thread.join()
        ticks = sum(used - self._before.get(key, 0) for key, used in self._latest.items())
        self.cost = Cost(ticks / TICK, self._peak)

    def _follow(self) -> None:
        while not self._stop.wait(self.every):
            self._look()

    def _look(self) -> None:
        self._latest |= cpu_ticks(self.pid)
        self._peak = max(self._peak, anonymous_kib(self.pid))


def cpu_ticks(root: int) -> dict[tuple[int, int], int]:
    """(pid, start time) -> user + system ticks of the process itself, for the tree below root."""
    return {(pid, fields[19]): fields[11] + fields[12] for pid, fields in _tree(root).items()}


def anonymous_kib(root: int) -> int:
    """Anonymous resident memory of the tree below root, in KiB."""
    total = 0
    for pid in _tree(root):
        for line in _text(pid, "status").splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1])
    return total


def _tree(root: int) -> dict[int, list[int]]:
    """pid -> the numbers of /proc/PID/stat after the command, for root and its descendants."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (text := _text(int(entry), "stat")):
            after = text.rpartition(")")[2].split()
            found[int(entry)] = [0, *map(int, after[1:])]
    children: dict[int, list[int]] = {}
    for pid, fields in found.items():
        children.setdefault(fields[1], []).append(pid)
    below, queue = {}, [root]
    while queue:
        pid = queue.pop()
        if pid in found:
            below[pid] = found[pid]
        queue += children.get(pid, [])
    return below


def _text(pid: int, name: str) -> str:
    """A file of /proc/PID, or "" if the process has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
