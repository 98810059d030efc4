"""Programs that belong together: started, watched, started again when they end, ended together."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

QUICK, LONGEST = 10.0, 30.0  # seconds: an end sooner than this doubles the wait, up to that


@dataclass
class Program:
    """One program; its output is appended to ``log``."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait: float = 1.0
    due: float = 0.0

    def start(self) -> None:
        """Start it; a write to its standard input is never read."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the supervisor, which ends them in order
            )
        self.started = time.monotonic()

    def ended(self) -> int | None:
        """Its exit status if it has ended since it was started last; None otherwise."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        self.process = None
        lived = time.monotonic() - self.started
        self.wait = min(2 * self.wait, LONGEST) if lived < QUICK else 1.0
        self.due = time.monotonic() + self.wait
        return status

    def last_line(self) -> str:
        """What it said last."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


@dataclass
class Supervisor:
    """Keeps programs running. ``tell`` gets a line when one ends."""

    tell: Callable[[str], None]
    programs: list[Program] = field(default_factory=list)

    def add(self, program: Program) -> None:
        """Start one more."""
        program.start()
        self.programs.append(program)

    def look(self) -> None:
        """Start again what has ended, after a wait."""
        for program in self.programs:
            status = program.ended()
            if status is not None:
                self.tell(
                    f"{program.name} ended ({status}): {program.last_line()[-160:]}; "
                    f"again in {program.wait:.0f} s"
                )
            elif program.process is None and time.monotonic() >= program.due:
                program.start()

    def end(self) -> None:
        """Ask all to end, the last one first, and end those that do not within five seconds."""
        running = [p.process for p in reversed(self.programs) if p.process is not None]
        for process in running:
            process.terminate()
        until = time.monotonic() + 5
        for process in running:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
