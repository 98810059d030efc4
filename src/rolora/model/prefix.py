"""The layers below the adapters, computed once per token for a whole run and kept on disk.

What leaves these frozen layers is the same in every round. The name of its safetensors file is a
hash of the base, the layer, the rows' tokens and the number of threads: others find another file.
The file holds a hash of its tensor, and is used only if no one but its owner can have written it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import stat
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rolora.data.examples import Examples, collate
from rolora.files import TEMPORARY, being_written, sweep, sync
from rolora.model.base import Base

TOKENS_AT_ONCE = 4096
LEFT_AFTER = 86400.0  # seconds after which a half-written file counts as abandoned
# safetensors' names
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Prefix:
    """Where the outputs of a base's frozen layers are for some rows, and how large they are."""

    file: Path
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor (tokens, hidden)."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self) -> Tensor | None:
        """The tensor, mapped from the file and not loaded.

        None if the file is not there or damaged, or others may have written it.
        """
        try:
            if not _own(self.file):
                return None
            with safe_open(self.file, framework="pt") as stored:
                hidden: Tensor = stored.get_tensor("hidden")
                hash = (stored.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        fits = (tuple(hidden.shape), hidden.dtype) == (self.shape, self.dtype)
        return hidden if fits and _hash(hidden) == hash else None


def _own(path: Path) -> bool:
    """Whether it is ours or root's, and no one else can write to it. OSError if it is missing."""
    found = path.stat()
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (os.getuid(), 0) and not others


def _hash(hidden: Tensor) -> str:
    return hashlib.sha256(hidden.view(torch.uint8).numpy().data).hexdigest()


def below_adapters(base: Base, examples: Examples, folder: Path) -> Prefix | None:
    """Where the prefix of these rows belongs.

    None if the lowest layer carries an adapter, or the model cannot run packed.
    """
    stack, examples = base.stack, examples.sequences
    if stack is None or stack.lowest == 0 or not stack.fits(examples.lengths):
        return None
    threads = torch.get_num_threads()  # a sum in another order may end in other bits
    digest = hashlib.sha256(f"{base.digest} {stack.lowest} {threads}".encode())
    for tensor in (examples.tokens, examples.offsets, examples.types):
        digest.update(b"" if tensor is None else tensor.numpy().data)
    width = int(base.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    shape = (examples.tokens.numel(), width)
    return Prefix(folder / f"{digest.hexdigest()[:32]}.safetensors", shape, base.dtype)


def kept_below(base: Base, examples: Examples, folder: Path) -> tuple[Examples, str]:
    """The rows with their prefix, where there is one to keep; and one line on it for the user.

    A folder that cannot be used is named there, and the rows come back without.
    """
    prefix = below_adapters(base, examples, folder)
    if prefix is None or base.stack is None:
        return examples, ""
    try:
        found = with_prefix(base, examples, prefix)
    except OSError as error:
        reason = error.strerror or str(error)
        return examples, f"frozen layers run in every step: {folder} cannot be used ({reason})"
    layers, size = base.stack.lowest, prefix.num_bytes / 1e6
    return found, f"outputs of the layers below the adapters ({layers}): {size:.1f} MB in {folder}"


def with_prefix(base: Base, examples: Examples, prefix: Prefix) -> Examples:
    """The rows with what enters the lowest adapted layer, read from disk or computed and kept.

    Raises OSError where the folder cannot be written or is full, or others may write to it; nothing
    is left behind then.
    """
    folder = prefix.file.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _own(folder):
        raise PermissionError(errno.EPERM, "others may write to it")
    sweep(folder, seconds=LEFT_AFTER)
    found = prefix.read()
    if found is None:
        _compute(base, examples, prefix)
        found = prefix.read()
    return replace(examples, prefix=found)


def _compute(base: Base, examples: Examples, prefix: Prefix) -> None:
    part = prefix.file.with_name(f"{TEMPORARY}{prefix.file.name}-{os.getpid()}")
    entry = {"dtype": NAMES[prefix.dtype], "shape": prefix.shape}

    def header(hash: str) -> bytes:
        about = {"__metadata__": {"sha256": hash}}
        text = json.dumps({**about, "hidden": {**entry, "data_offsets": [0, prefix.num_bytes]}})
        return text.encode() + b" " * (-len(text) % 8)

    blank = header("0" * 64)
    begin = 8 + len(blank)
    try:
        with open(part, "w+b", opener=partial(os.open, mode=0o600)) as file:
            being_written(file)
            # a full disk says so here, and not by a signal in the middle
            os.posix_fallocate(file.fileno(), 0, begin + prefix.num_bytes)
            file.write(len(blank).to_bytes(8, "little"))
            file.flush()
            with mmap.mmap(file.fileno(), 0) as memory:
                into = torch.frombuffer(memory, dtype=prefix.dtype, offset=begin)
                _fill(base, examples, into.view(prefix.shape))
                memory[8:begin] = header(_hash(into))
                del into
                memory.flush()
        sync(part)
        part.replace(prefix.file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(prefix.file.parent)


def _fill(base: Base, examples: Examples, into: Tensor) -> None:
    """Run all rows, short ones first, some thousand tokens at a time."""
    assert base.stack is not None
    examples = examples.sequences
    order = examples.lengths.argsort(stable=True)
    turn = (examples.lengths[order].cumsum(0) - 1) // TOKENS_AT_ONCE
    for rows in torch.split(order, torch.unique(turn, return_counts=True)[1].tolist()):
        batch = collate(examples, rows, base.tokenizer.pad_token_id).to(base.device)
        inputs = {name: x for name, x in batch.inputs.items() if name != "attention_mask"}
        hidden = base.stack.below(base.model, inputs, batch.lengths).cpu()
        parts = torch.split(hidden, batch.lengths.tolist())
        for start, part in zip(examples.offsets[rows].tolist(), parts, strict=True):
            into[start : start + len(part)] = part
