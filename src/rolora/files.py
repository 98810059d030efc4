"""Writing so that a file or folder is there whole or not at all, whenever the power goes; locks.

New bytes go under a temporary name in the same folder, are flushed to the disk, and are renamed
into place; then the folder that holds the name is flushed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".part-"


def write_file(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content``, or leave it as it was (OSError, for example disk full)."""
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well and vanishes otherwise.

    A folder that stands at ``path`` is replaced.
    """
    part = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            sync(file)
        sync(part)
        if path.exists():
            old = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-old")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old)
        else:
            part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold this lock file for as long as the block, or this process, lasts.

    Raises BlockingIOError if another process holds it, unless told to ``wait``.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock file."""
    try:
        with locked(path):
            return False
    except BlockingIOError:
        return True


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
