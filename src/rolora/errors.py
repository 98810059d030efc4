"""What can go wrong for a user, and the exit code that says which kind it was.

Every error here is one line: what was wrong and what to do. The command line prints that line
and leaves with ``exit_code``; a traceback is for our mistakes, never for a user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class RoloraError(Exception):
    """A failure while running (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))  # it may quote names and cells, which hold anything


class ConfigError(RoloraError):
    """Bad usage or configuration (exit code 2)."""

    exit_code = 2


class DataError(RoloraError):
    """Data that cannot be used as it is (exit code 3)."""

    exit_code = 3


class AllDiverged(DataError):
    """Training became NaN or infinite in every run, so there is nothing to compare."""


class NotHere(DataError):
    """Data that is not here: ``source`` as the user wrote it, ``path`` if it is a file."""

    def __init__(self, message: str, source: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.source = source
        self.path = path


class ModelNotHere(ConfigError):
    """A model's file or folder, ``path``, that does not exist."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class NoQuorum(RoloraError):
    """Too few usable updates came back; the run can be resumed (exit code 4)."""

    exit_code = 4


class BudgetSpent(RoloraError):
    """A comparison has used up the time it was given; it can be resumed (exit code 5)."""

    exit_code = 5


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "failed while running",
    2: "bad usage or configuration",
    3: "bad data",
    4: "no quorum (resumable)",
    5: "budget spent (resumable)",
    130: "interrupted (resumable)",
}


def nearest(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """A hint naming the choice that looks most like ``word``, or all choices if none does.

    ``prefix`` is put before the choice that is named.
    """
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {prefix + close[0]!r}?" if close else f"known: {', '.join(options)}"


def one_line(error: Exception) -> str:
    """The start of another library's error, on one line."""
    return " ".join(str(error).split())[:160]


def printable(text: str, keep: str = "") -> str:
    """``text`` with what is not printable, such as line breaks and terminal commands, escaped.

    Names of columns, labels and files are their owners' and may hold anything. ``keep`` lists
    characters that are left as they are.
    """
    return "".join(
        letter
        if letter.isprintable() or letter in keep
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
