"""Faults at the n-th file operation of a process: a kill, a torn write, a power cut, a full disk.

``inject`` replaces Python's functions for files. Only operations in one folder count: opening a
file for writing, each write of the operating system, fsync, rename, unlink, mkdir and rmdir.
``in_child`` runs a function in a forked process, which such a fault may end.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import os
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

# what happens before the operation -> the operations to which it can happen
EVERY = frozenset({"open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir"})
FAULTS: dict[str, frozenset[str]] = {
    "killed": EVERY,
    "killed in the middle": frozenset({"write"}),
    "power cut": EVERY,
    "disk full": frozenset({"open", "write", "mkdir"}),
    "I/O error": EVERY - {"open", "mkdir"},
}
ENDS = ("killed", "killed in the middle", "power cut")  # those that end the process
BROKEN = 99  # exit code of a child that ended with a traceback


# its kind, the path in the folder, whether a power cut would lose something then
Operation = tuple[str, str, bool]


@dataclass
class Injection:
    """Counts the file operations in ``root`` and lets the fault happen before number ``at``.

    ``seen``: what was done so far, if nothing is to happen. ``unsynced``: the inode of a file with
    content that a power cut may lose -> how many bytes are safe; ``unnamed``: that of a folder ->
    the new names in it that one may lose.
    """

    root: Path
    at: int = 0
    fault: str = ""
    count: int = 0
    seen: list[Operation] = field(default_factory=list)
    unsynced: dict[int, int] = field(default_factory=dict)
    unnamed: dict[int, set[str]] = field(default_factory=dict)
    counted: bool = False

    def inside(self, path: str) -> bool:
        return path == str(self.root) or path.startswith(f"{self.root}/")

    def happens(self, kind: str, path: str, half: Callable[[], object]) -> None:
        """Count an operation, which is about to be done."""
        self.count += 1
        if self.at == 0:
            unsafe = bool(self.unsynced or any(self.unnamed.values()))
            self.seen.append((kind, os.path.relpath(path, self.root), unsafe))
            return
        if self.count < self.at:
            return
        if self.fault == "disk full" and kind in FAULTS["disk full"]:  # and stays full
            half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.count > self.at:
            return
        if self.fault == "I/O error":
            half()
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if self.fault == "killed in the middle":
            half()
        if self.fault == "power cut":
            self.lose()
        if self.fault in ENDS:
            os.kill(os.getpid(), signal.SIGKILL)

    def lose(self) -> None:
        """What a disk may be without: content and names that nobody has flushed."""
        folders = [self.root, *(p for p in self.root.rglob("*") if p.is_dir())]
        for folder in folders:
            if folder.exists():
                for name in self.unnamed.get(folder.stat().st_ino, set()):
                    _remove(folder / name)
        for file in self.root.rglob("*"):
            if file.is_file() and file.stat().st_ino in self.unsynced:
                os.truncate(file, self.unsynced[file.stat().st_ino])

    def named(self, path: str) -> None:
        """There is a new name, on the disk once its folder is flushed."""
        parent, name = os.path.split(path)
        self.unnamed.setdefault(os.stat(parent).st_ino, set()).add(name)

    def flushed(self, handle: int) -> None:
        about = os.fstat(handle)
        self.unsynced.pop(about.st_ino, None)
        if stat.S_ISDIR(about.st_mode):
            self.unnamed.pop(about.st_ino, None)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def inject(root: Path, at: int = 0, fault: str = "") -> Injection:
    """Watch this process's file operations in ``root``, until it ends; see :class:`Injection`."""
    found = Injection(root.resolve(), at, fault)
    real_open, real = io.open, {name: getattr(os, name) for name in _NAMES}

    def place(path: Any, dir_fd: int | None = None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        name = os.fsdecode(path)
        return os.path.abspath(name if dir_fd is None else os.path.join(place(dir_fd), name))

    class Watched(io.FileIO):
        """A file whose every write counts."""

        def __init__(self, path: str, mode: str, opener: Any) -> None:
            found.counted = True  # by who opens it, and not again by an opener
            try:
                super().__init__(path, mode, opener=opener)
            finally:
                found.counted = False

        def write(self, data: Any) -> int:
            whole = bytes(data)
            put = super().write
            found.happens("write", place(self.fileno()), lambda: put(whole[: len(whole) // 2]))
            about = os.fstat(self.fileno())
            found.unsynced.setdefault(about.st_ino, about.st_size)
            return int(put(whole))

    def watched_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not found.inside(place(file)):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        path = place(file)
        new = not os.path.exists(path)
        found.happens("open", path, lambda: None)
        raw = Watched(path, mode.replace("b", "").replace("t", ""), opener)
        if new:
            found.named(path)
        if buffering == 0:
            return raw
        buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    def low_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = place(path, dir_fd)
        if not flags & os.O_CREAT or not found.inside(where) or found.counted:
            return int(real["open"](path, flags, mode, dir_fd=dir_fd))
        new = not os.path.exists(where)
        found.happens("open", where, lambda: None)
        handle = int(real["open"](path, flags, mode, dir_fd=dir_fd))
        if new:
            found.named(where)
        return handle

    def fsync(handle: int) -> None:
        if found.inside(place(handle)):
            found.happens("fsync", place(handle), lambda: None)
            found.flushed(handle)
        real["fsync"](handle)

    def renaming(name: str) -> Callable[..., None]:
        def rename(source: Any, target: Any, **given: Any) -> None:
            where = place(target, given.get("dst_dir_fd"))
            if not found.inside(where):
                return real[name](source, target, **given)  # type: ignore[no-any-return]
            new = not os.path.exists(where)
            found.happens("rename", where, lambda: None)
            real[name](source, target, **given)
            if new:
                found.named(where)
            return None

        return rename

    def on_path(kind: str, name: str, names: bool = False) -> Callable[..., None]:
        def change(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
            where = place(path, dir_fd)
            if found.inside(where):
                found.happens(kind, where, lambda: None)
            real[name](path, *rest, dir_fd=dir_fd)
            if names and found.inside(where):
                found.named(where)

        return change

    def save(tokenizer: Any, path: str, *rest: Any) -> None:
        """A tokenizer's file is written in Rust, whose errors are not OSError."""
        where = place(path)
        if found.inside(where):
            text = tokenizer.to_str()
            try:
                found.happens(
                    "write", where, lambda: Path(where).write_text(text[: len(text) // 2])
                )
            except OSError as error:
                raise Exception(f"{error.strerror} (os error {error.errno})") from None
        real_save(tokenizer, path, *rest)
        if found.inside(where):
            found.named(where)
            found.unsynced[os.stat(where).st_ino] = 0

    def put_half(path: str, text: str) -> None:
        with real_open(path, "w") as file:
            file.write(text[: len(text) // 2])

    real_save = tokenizers.Tokenizer.save
    tokenizers.Tokenizer.save = save  # type: ignore[method-assign, assignment]
    builtins.open = io.open = watched_open
    os.open, os.fsync = low_open, fsync  # type: ignore[assignment]
    os.rename, os.replace = renaming("rename"), renaming("replace")
    os.unlink, os.remove = on_path("unlink", "unlink"), on_path("unlink", "remove")
    os.mkdir, os.rmdir = on_path("mkdir", "mkdir", names=True), on_path("rmdir", "rmdir")
    return found


_NAMES = ("open", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")


def in_child(work: Callable[[], None], said: Path) -> int:
    """Run ``work`` in a forked process; its exit code, or minus the signal that ended it.

    What it prints goes into the file ``said``; with a traceback, the code is ``BROKEN``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # a collection in the child would touch, and so copy, all that is loaded here
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def possible(seen: list[Operation], faults: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Every fault at every one of these operations, and a kill after the last one.

    Without those that leave the disk as another one does: a kill after fsync as one before it, a
    power cut that finds everything flushed as a kill.
    """
    for fault in faults:
        for number, (kind, _, unsafe) in enumerate(seen, start=1):
            same = fault == "killed" and number > 1 and seen[number - 2][0] == "fsync"
            if kind in FAULTS[fault] and not same and (fault != "power cut" or unsafe):
                yield fault, number
        if fault == "killed":
            yield fault, len(seen) + 1
