"""Atomic writes of files and folders, even if the power fails; and lock files.

New bytes go under a temporary name in the same folder, are flushed to the disk, and are renamed
into place; then the folder that holds the name is flushed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from rolora.errors import ConfigError

TEMPORARY = ".part-"
DOOMED = ".old-"  # a folder under this prefix is being deleted
LOOK = 0.2  # seconds; ``is_locked`` holds a lock for much less


def from_home(path: str | Path) -> Path:
    """The path, with "~" or "~NAME" at its start as that user's home. ConfigError without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: this machine has no user of that name; write the whole path"
        ) from None


def write_file(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Replace ``path`` by ``content``, or leave it as it was (OSError, for example disk full).

    ``mode``: who may read and write it, from the start, less the process's umask.
    """
    data = content.encode() if isinstance(content, str) else content
    with new_file(path) as part, open(part, "wb", opener=partial(os.open, mode=mode)) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` when the block ends well, or else vanishes."""
    part = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        yield part
        sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def finite(value: object) -> Any:
    """The value as JSON can hold it: a number that is NaN or infinite becomes None."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, inf_nan_mode="null")


def append_line(path: Path, line: str) -> None:
    """Append ``line`` to a file and flush it to the disk, or leave the file as it was.

    Half a line left by a killed process stays a separate line.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        data = (b"\n" if torn else b"") + line.encode() + b"\n"
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise
    if size == 0:
        sync(path.parent)


def make_folder(path: Path) -> None:
    """Make this folder and its missing parents, and flush them to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well and vanishes otherwise.

    If ``path`` exists by then, it is replaced if ``replace``; otherwise ConfigError. Remains of
    killed processes are deleted.
    """
    make_folder(path.parent)
    part = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with _opened(path.parent) as above:
        fcntl.flock(above, fcntl.LOCK_SH)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            for file in part.rglob("*"):
                sync(file)
            sync(part)
            if replace and path.exists():
                old = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-old")
                path.rename(old)
                try:
                    part.rename(path)
                except BaseException:
                    old.rename(path)
                    raise
                shutil.rmtree(old)
            else:
                _rename_to_new(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync(path.parent)
    sweep_beside(path)


def _rename_to_new(part: Path, path: Path) -> None:
    try:
        part.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ConfigError(
                f"{path} exists and is not overwritten: another process has just made it"
            ) from error
        raise


def sweep_beside(path: Path) -> None:
    """Delete what killed processes have left of new folders that were to become ``path``.

    Only if ``path`` exists: otherwise its last copy may be among them. Nothing is deleted while a
    process fills a new folder next to it: each holds a lock on the folder above until its folder
    has its name, and a lock ends with its process.
    """
    left = re.compile(rf"{re.escape(TEMPORARY + path.name)}-\d+(-old)?")
    with _opened(path.parent) as above:
        try:
            fcntl.flock(above, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is at work, or the file system has no such locks
            return
        for found in path.parent.iterdir():
            if left.fullmatch(found.name) and found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)


def sweep(folder: Path, seconds: float | None = None) -> None:
    """Delete what killed processes have left half written or half deleted, here and below.

    The caller holds the folder's lock, or gives ``seconds``: then only what was last written longer
    ago is deleted. A file that is ``being_written`` stays.
    """
    found = [path for prefix in (TEMPORARY, DOOMED) for path in folder.rglob(f"{prefix}*")]
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # within another one
            fresh = seconds is not None and path.lstat().st_mtime > time.time() - seconds
            if fresh or is_locked(path):  # a clock may jump
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def being_written(file: IO[bytes]) -> None:
    """Keep every process's :func:`sweep` from deleting this file until it is closed."""
    fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` until the block, or this process, ends.

    Raises ConfigError if another process holds it, unless told to ``wait``.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else LOOK, poll_interval=LOOK / 10)
    except Timeout:
        raise ConfigError(f"{path.parent} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on this file, which is only read."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    with _opened(path) as handle:
        os.fsync(handle)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or folder, to read."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
