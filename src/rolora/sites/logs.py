"""Logs that stay small, and whose records cannot be forged by what others send.

The programs of a federation write to files; the program that started them keeps these bounded.
"""

from __future__ import annotations

import logging
import os
import shutil
import traceback
from pathlib import Path
from typing import Any

from rolora.errors import printable

LARGEST = 10_000_000  # bytes of a file, before it is moved aside
KEPT = 5  # files beside the newest


def escape_records() -> None:
    """From now on a log record of this process, of whatever library, is one printable line.

    A record quotes what others have sent, which must neither start a new line nor control a
    terminal. Only a traceback has further lines, each indented.
    """
    logging.setLogRecordFactory(_escaped)


def _escaped(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # a caller's mistake, which no logger raises
        text = f"{record.msg} {record.args!r}"
    record.msg, record.args = printable(text), None
    if record.exc_info and record.exc_info[0] is not None:
        lines = "".join(traceback.format_exception(*record.exc_info)).splitlines()
        record.exc_text = "\n".join(f"  {printable(line)}" for line in lines)
    return record


def bound(path: Path, size: int = LARGEST) -> None:
    """If this file has more than ``size`` bytes, empty it and keep the old one as PATH.1 … PATH.5.

    It is copied and emptied, since programs that append to it have it open.
    """
    if not path.exists() or path.stat().st_size <= size:
        return
    older = [path.with_name(f"{path.name}.{number}") for number in range(KEPT, 0, -1)]
    for newer, old in zip(older[1:], older, strict=False):
        if newer.exists():
            newer.replace(old)
    shutil.copy(path, older[-1])
    os.truncate(path, 0)
