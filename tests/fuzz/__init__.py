"""Whatever another party wrote is read or refused: one target for each reader.

A target is a file with ``target(data)``, which gives these bytes to the real reader, and
``SEEDS``, inputs that it reads. It lets only unexpected errors through, and checks what comes back.
Targets are tried by ``tests/test_fuzz.py`` (Hypothesis), and for as long as one likes by
``python -m tests.fuzz`` (``make fuzz``). An input that went wrong is kept in ``crashes/TARGET``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TARGETS = ("update", "answer", "question", "kept", "adapter", "settings", "rows")
CRASHES = Path(__file__).with_name("crashes")
LONGEST = 1 << 16  # bytes of an input
MEMORY = 512  # MB that an input may take
SECONDS = 10  # that it may take


def load(name: str) -> tuple[Callable[[bytes], None], Sequence[bytes]]:
    """A target and its seeds."""
    module: Any = importlib.import_module(f"fuzz.{name}")
    return module.target, module.SEEDS


def crashes(name: str) -> list[Path]:
    """The inputs that once went wrong."""
    return sorted(file for file in (CRASHES / name).glob("*") if file.is_file())


def folder() -> Path:
    """A new folder, in memory where possible, that is gone when this process ends."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="rolora-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def with_head(data: bytes, usual: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """The head of a message, and its body if there is one.

    ``data`` is JSON, which replaces keys of the ``usual`` head (null removes one), and after a line
    break the body. What is no table of JSON is given as the value of each text.
    """
    text, line_break, body = data.partition(b"\n")
    changed: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        changed = json.loads(text) if text else {}
    if not isinstance(changed, dict):
        said = text.decode("utf-8", "surrogateescape")
        changed = {key: said for key, value in usual.items() if isinstance(value, str)}
    head = {k: v for k, v in {**usual, **changed}.items() if isinstance(v, str | int | float)}
    return head, body if line_break else None
