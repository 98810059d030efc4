"""How many bytes the current run expects in one message: its app tells the SuperLink's gate.

The app writes the number into ``expected/PID`` in the federation's folder. The number of an app
that was killed does not count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from rolora.files import write_file


@contextmanager
def expecting(folder: Path) -> Iterator[Callable[[int], None]]:
    """A function that tells how many bytes this process now expects, until the block ends."""
    place = folder / "expected"
    place.mkdir(exist_ok=True)
    for file in place.glob("[0-9]*"):
        if not _lives(file):
            file.unlink(missing_ok=True)
    own = place / str(os.getpid())
    try:
        yield lambda size: write_file(own, str(size))
    finally:
        own.unlink(missing_ok=True)


def largest(folder: Path) -> int:
    """The most bytes that a process which is alive expects; 0 if there is none."""
    most = 0
    for file in (folder / "expected").glob("[0-9]*"):
        with suppress(FileNotFoundError):  # its run has just ended
            if _lives(file):
                most = max(most, int(file.read_text()))
    return most


def _lives(file: Path) -> bool:
    """Whether the process that this file is named after is alive (and not a zombie)."""
    try:
        return bool(psutil.Process(int(file.name)).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
