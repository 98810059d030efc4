"""How commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from rolora.errors import NoQuorum, printable

out_console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err_console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
T = TypeVar("T")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    align: str = "lr",
    widths: Sequence[int] = (),
) -> Table:
    """A table without rules.

    ``align`` has an ``l`` or ``r`` for each column; the last one also holds for all further
    columns. ``widths`` are the minimum widths of the first columns.
    """
    made = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(head):
        right = align[min(number, len(align) - 1)] == "r"
        width = widths[number] if number < len(widths) else None
        made.add_column(
            printable(name), justify="right" if right else "left", min_width=width, overflow="fold"
        )
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def show(as_json: bool, value: object, *parts: RenderableType) -> None:
    """Print a result on standard output: ``value`` as JSON, or ``parts`` for people to read.

    Lines of a ``Text`` are broken between words where the terminal ends.
    """
    if as_json:
        from rolora.files import finite

        print(json.dumps(finite(value), indent=2))
    else:
        for part in parts:
            out_console.print(part, soft_wrap=not isinstance(part, Text))


def note(text: str) -> None:
    """Print a remark on standard error."""
    err_console.print(f"note: {printable(text)}")


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a progress bar; a plain line if there is no terminal."""
    if err_console.is_terminal:
        yield from track(items, what, console=err_console, transient=True)
    else:
        err_console.print(f"{what} ...")
        yield from items


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP; a BaseException, so that no library handles it as an error."""


@contextlib.contextmanager
def going_on(command: Sequence[object], run: Path | None = None) -> Iterator[None]:
    """Add ``command``, as the way to continue, to the exception that interrupts the block.

    With ``run``, a folder: only if that run has started.
    """
    try:
        yield
    except (Interrupted, NoQuorum, OSError) as error:
        if run is None or (run / "config.toml").is_file():
            error.add_note(shlex.join(map(str, command)))
        raise


def again() -> contextlib.AbstractContextManager[None]:
    """Add to the exception that interrupts the block that the same command continues."""
    return going_on(("rolora", *sys.argv[1:]))


def resuming(run: Path) -> contextlib.AbstractContextManager[None]:
    """Add to the exception that interrupts the block how to resume the run in this folder."""
    return going_on(("rolora", "resume", run), run)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner during something slow; a plain line if there is no terminal."""
    if err_console.is_terminal:
        with err_console.status(what):  # the same console, so that a bar can stand below
            yield
    else:
        err_console.print(f"{what} ...")
        yield
