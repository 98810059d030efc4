"""Child processes that end when this process ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COLOUR = re.compile(r"\x1b\[[\d;]*m")
ENDS_WITHIN = 5.0  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Program:
    """A child process whose output is appended to ``log``."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def fault(self) -> str | None:
        """If it has ended: its exit status and the last line of its log."""
        if (status := self.process.poll()) is None:
            return None
        text = COLOUR.sub("", self.log.read_text(errors="replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = f": {lines[-1][-200:]}" if lines else ""
        return f"{self.name} ended with status {status}{last} ({self.log})"


@contextmanager
def running(
    name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[Program]:
    """Run a command while the block lasts."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends them in order
        )
    try:
        yield Program(name, process, log)
    finally:
        process.terminate()
        try:
            process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent(parent: int) -> None:
    """Interrupt this process when the process that started it, whose id is ``parent``, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
