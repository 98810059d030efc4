"""Atomic writes of files and folders, whenever the power goes; and lock files.

New bytes go under a temporary name in the same folder, are flushed to the disk, and are renamed
into place; then the folder that holds the name is flushed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rolora.errors import ConfigError

TEMPORARY = ".part-"
DOOMED = ".old-"  # a folder under this prefix is being deleted


def from_home(path: str | Path) -> Path:
    """The path, with "~" or "~NAME" at its start as that user's home. ConfigError without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: this machine has no user of that name; write the whole path"
        ) from None


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


def sweep(folder: Path, seconds: float = 0.0) -> None:
    """Delete what killed processes have left half written or half deleted, here and below.

    Only for who holds the folder's lock, or for what was last written more than ``seconds`` ago.
    """
    before = time.time() - seconds
    found = [path for prefix in (TEMPORARY, DOOMED) for path in folder.rglob(f"{prefix}*")]
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # within another one
            if path.lstat().st_mtime > before:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` until the block, or this process, ends.

    Raises ConfigError if another process holds it, unless told to ``wait``.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ConfigError(f"{path.parent} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock file."""
    try:
        with locked(path):
            return False
    except ConfigError:
        return True


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
