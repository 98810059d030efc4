"""A tensor that a base model computes from rows, kept on disk for every run that needs it.

The name of its safetensors file is a hash of the base, the rows' tokens, the number of threads and
what is computed: others find another file. The file holds a hash of its tensor, and is used only if
no one but its owner can have written it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rolora.files import TEMPORARY, being_written, sweep, sync
from rolora.model.base import Base

LEFT_AFTER = 86400.0  # seconds after which a half-written file counts as abandoned
# safetensors' names
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Kept:
    """Where a tensor is kept, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor | None:
        """The tensor, mapped from the file and not loaded.

        None if the file is not there or damaged, or others may have written it.
        """
        try:
            if not _own(self.file):
                return None
            with safe_open(self.file, framework="pt") as stored:
                found: Tensor = stored.get_tensor("kept")
                hash = (stored.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        fits = (tuple(found.shape), found.dtype) == (self.shape, self.dtype)
        return found if fits and _hash(found) == hash else None

    def made(self, fill: Callable[[Tensor], None]) -> Tensor | None:
        """The tensor, read from disk, or filled with its values by ``fill`` and kept.

        Raises OSError where the folder cannot be written or is full, or others may write to it;
        nothing is left behind then.
        """
        folder = self.file.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(folder):
            raise PermissionError(errno.EPERM, "others may write to it")
        sweep(folder, seconds=LEFT_AFTER)
        found = self.read()
        if found is None:
            _write(self, fill)
            found = self.read()
        return found


def kept(
    folder: Path,
    base: Base,
    what: str,
    rows: Iterable[Tensor | None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Kept:
    """Where ``what`` is kept that this base computes from these tensors."""
    threads = torch.get_num_threads()  # a sum in another order may end in other bits
    digest = hashlib.sha256(f"{base.digest} {base.device.type} {threads} {what}".encode())
    for tensor in rows:
        digest.update(b"" if tensor is None else tensor.numpy().data)
    return Kept(folder / f"{digest.hexdigest()[:32]}.safetensors", shape, dtype)


def _own(path: Path) -> bool:
    """Whether it is ours or root's, and no one else can write to it. OSError if it is missing."""
    found = path.stat()
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (os.getuid(), 0) and not others


def _hash(found: Tensor) -> str:
    return hashlib.sha256(found.view(torch.uint8).numpy().data).hexdigest()


def _write(place: Kept, fill: Callable[[Tensor], None]) -> None:
    part = place.file.with_name(f"{TEMPORARY}{place.file.name}-{os.getpid()}")
    entry = {"dtype": NAMES[place.dtype], "shape": place.shape}

    def header(hash: str) -> bytes:
        about = {"__metadata__": {"sha256": hash}}
        text = json.dumps({**about, "kept": {**entry, "data_offsets": [0, place.num_bytes]}})
        return text.encode() + b" " * (-len(text) % 8)

    blank = header("0" * 64)
    begin = 8 + len(blank)
    try:
        with open(part, "w+b", opener=partial(os.open, mode=0o600)) as file:
            being_written(file)
            # a full disk says so here, and not by a signal in the middle
            os.posix_fallocate(file.fileno(), 0, begin + place.num_bytes)
            file.write(len(blank).to_bytes(8, "little"))
            file.flush()
            with mmap.mmap(file.fileno(), 0) as memory:
                into = torch.frombuffer(memory, dtype=place.dtype, offset=begin)
                fill(into.view(place.shape))
                memory[8:begin] = header(_hash(into))
                del into
                memory.flush()
        sync(part)
        part.replace(place.file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(place.file.parent)
