"""A federation of real processes on this machine, to kill parts of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_bert
from tiny_site import write_rows

from rolora.config.load import load_config
from rolora.run import runs
from rolora.sites.local_trial import make_trial

NAMES = ("ann", "bob", "cy")
ROLORA = ("-m", "rolora")
CONFIG = """\
name = "tiny"
[model]
path = "model"
dtype = "fp32"
[lora]
rank = 2
alpha = 4
target_modules = ["query", "value"]
[data]
train = "*.csv"
test = "test/test.csv"
max_length = 32
[partition]
scheme = "files"
[train]
rounds = 6
local_steps = 80
batch_size = 4
bank = 1
cache = ""
[federation]
sites = 3
wait = 90
deadline = 90
"""


def until(true: Callable[[], object], seconds: float = 300.0, what: str = "") -> None:
    """Wait. AssertionError if it has not come true in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what or true}"
        time.sleep(0.05)


def free_port() -> int:
    """A port such that nothing listens on it or on the next."""
    while True:
        with socket.socket() as listener, socket.socket() as control:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                control.bind(("127.0.0.1", port + 1))
                return port


def make_place(folder: Path) -> Path:
    """A tiny model, three sites' rows, and ``tiny.toml``; the configuration."""
    tiny_bert(folder / "model")
    (folder / "test").mkdir()
    write_rows(folder / "test" / "test.csv", 12)
    for name, rows in zip(NAMES, (21, 9, 14), strict=True):
        write_rows(folder / f"{name}.csv", rows)
    (folder / "tiny.toml").write_text(CONFIG)
    return folder / "tiny.toml"


@dataclass
class Command:
    """A ``rolora`` command that runs; its output is in ``log``."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, log: Path, *words: object, program: Sequence[str] = ROLORA) -> Command:
        """Start it, in a session of its own so that it can be signalled alone."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *program, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        return cls(process, log)

    def output(self) -> str:
        """All output so far."""
        return self.log.read_text()

    def ended(self, seconds: float = 600.0) -> int:
        """Its exit code, waited for."""
        return self.process.wait(seconds)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Signal it and wait for its end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(30)


@dataclass
class Loopback:
    """A federation's folder, served, and the sites that were started by hand."""

    folder: Path
    served: Command | None = None
    sites: dict[str, Command] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Where runs go."""
        return self.folder.parent

    def serve(self) -> None:
        """Start ``rolora federation serve``, as systemd would, and wait until it serves."""
        log = self.folder / "serve.log"
        log.write_text("")
        self.served = command = Command.start(log, "federation", "serve", "--folder", self.folder)
        until(lambda: "start runs on it" in command.output(), 180, "the SuperLink")

    def join(self, *names: str, program: Sequence[str] = (*ROLORA, "site")) -> None:
        """Start these sites' processes, unless they run, and wait until they are connected."""
        for name in names:
            one = self.sites.get(name)
            if one is None or one.process.poll() is not None:
                log = self.folder / f"{name}.log"
                log.write_text("")
                file = self.folder / "sites" / name / "site.toml"
                self.sites[name] = Command.start(log, "--config", file, program=program)
        commands = [self.sites[name] for name in names]
        until(lambda: all("connected" in c.output() for c in commands), 180, f"{names} to connect")

    def leave(self, *names: str, number: int = signal.SIGTERM) -> None:
        """End these sites' processes."""
        for name in names:
            self.sites.pop(name).end(number)

    def answering(self, name: str) -> bool:
        """Whether this site has a question that it has not answered yet."""
        return (self.folder / "sites" / name / "state" / "question.bin").exists()

    def run(self, out: str, *overrides: str, resume: bool = False) -> Command:
        """Start a run on the federation, or resume it."""
        words = ["resume", self.place / out] if resume else []
        words = words or ["run", self.folder / "run.toml", *overrides]
        words += [] if resume else ["--on", self.folder, "--out", self.place / out]
        return Command.start(self.place / f"{out}.log", *words)

    def reached(self, out: str, round: int) -> None:
        """Wait until this round is committed."""
        until(lambda: self.at(out, round), what=f"{round=}")

    def at(self, out: str, round: int) -> bool:
        """Whether this round is committed."""
        return any(line["round"] == round for line in rounds(self.place / out))

    def kill_superlink(self) -> None:
        """Kill the SuperLink's process; ``rolora federation serve`` ends and names it."""
        (killed,) = processes(f"rolora.sites.superlink\0{self.folder}")
        os.kill(killed, signal.SIGKILL)
        assert self.served is not None
        assert self.served.ended(60) == 1, self.served.output()
        assert "the SuperLink ended with status -9" in self.served.output().splitlines()[-1]

    def serve_again(self, run: Command, out: str, round: int) -> Command:
        """Serve after ``kill_superlink``, and wait for this round; the run that goes on.

        Flower ends a run whose SuperLink was away for a minute: it is resumed.
        """
        self.serve()
        until(lambda: self.at(out, round) or run.process.poll() is not None, what=f"{round=}")
        if run.process.poll() in (None, 0):
            return run
        assert "continue with: rolora resume" in run.output().splitlines()[-1]
        return self.run(out, resume=True)

    def coordinator(self, out: str) -> int:
        """The process of a run's app."""
        return int((self.place / f".{out}.job" / "pid").read_text())

    def close(self) -> None:
        """End everything."""
        self.leave(*list(self.sites))
        if self.served is not None:
            self.served.end()


@contextlib.contextmanager
def federation(folder: Path, config: Path, *overrides: str) -> Iterator[Loopback]:
    """``rolora federation serve`` on a new folder with this configuration's rows dealt out."""
    make_trial(folder, str(config), overrides, len(NAMES), free_port())
    opened = Loopback(folder)
    try:
        opened.serve()
        yield opened
    finally:
        opened.close()


def here(config: Path, out: Path, *overrides: str) -> str:
    """The adapter's hash of the run in this process, on one thread like a site."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in runs.start(load_config(config, overrides), out).rounds():
            continue
    finally:
        torch.set_num_threads(threads)
    return adapter(out)


def adapter(out: Path) -> str:
    """sha256 of a run's adapter file."""
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def rounds(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's record."""
    file = out / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def processes(part: str) -> list[int]:
    """Processes with this in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if part.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
