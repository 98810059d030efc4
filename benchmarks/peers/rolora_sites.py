"""rolora across sites: ``rolora federation up``, and one ``rolora run --on`` a request.

Timed, inside: the time from one round's line in the record to the next one's, so all that a round
does: cohort, questions, training at the sites, checks, aggregation, checkpoint and record. Not
timed: starting the run, its first round, and its last, which evaluates and writes the report.

    python -m benchmarks.peers.rolora_sites FEDERATION ROUNDS ADAPTER_FILE
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.party import Answer, serve

ROLORA = (sys.executable, "-m", "rolora")


def started(command: Sequence[object]) -> subprocess.Popen[bytes]:
    """A command that reads nothing and speaks on standard error only."""
    return subprocess.Popen(
        [*map(str, command)], stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr
    )


class Stamps:
    """When each line of a run's record was seen, looked for 200 times a second."""

    def __init__(self, run: Path, process: subprocess.Popen[bytes]) -> None:
        self.file, self.process = run / "rounds.jsonl", process
        self.seen: list[float] = []

    def until(self, lines: int) -> list[float]:
        """Wait for so many lines. RuntimeError if the run ends before."""
        while len(self.seen) < lines:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended with {self.process.returncode}")
            text = self.file.read_bytes() if self.file.exists() else b""
            now = time.time()
            self.seen += [now] * (text.count(b"\n") - len(self.seen))
            time.sleep(0.005)
        return self.seen


@contextlib.contextmanager
def federation(folder: Path) -> Iterator[None]:
    """The federation and its sites, all connected, until this is left."""
    process = started([*ROLORA, "federation", "up", "--folder", folder])
    logs = [site / "site.log" for site in (folder / "sites").iterdir()]
    try:
        while not all(log.exists() and "connected" in log.read_text() for log in logs):
            if process.poll() is not None:
                raise RuntimeError("the federation ended")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def main(folder: Path, count: int, adapter: str) -> None:
    """Serve the federation, and answer."""
    with federation(folder), tempfile.TemporaryDirectory() as place:
        runs: list[Stamps] = []

        def prepare() -> None:
            out = Path(place) / f"run{len(runs)}"
            command = [*ROLORA, "run", folder / "run.toml", "--on", folder, "--out", out]
            runs.append(Stamps(out, started(command)))
            runs[-1].until(2)  # before training, and round 1

        def run() -> Answer:
            stamps = runs[-1].until(2 + count)[1 : 2 + count]
            found = [{"seconds": end - start} for start, end in itertools.pairwise(stamps)]
            return {"units": count, "rounds": found, "clock": [stamps[0], stamps[-1]]}

        def after() -> Answer:
            """The rest of the run: one round, its evaluation, and the adapter."""
            if runs[-1].process.wait():
                raise RuntimeError(f"the run ended with {runs[-1].process.returncode}")
            out = runs[-1].file.parent
            shutil.copy(out / "adapter" / "adapter_model.safetensors", adapter)
            return {}

        serve(run, prepare, after)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
