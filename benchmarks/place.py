"""Where benches run: the two Pythons, the data, the threads, and how long to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Party
from benchmarks.job import write_job
from rolora.config.schema import RunConfig
from rolora.demo.fetch import fetch

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Place:
    """``ours`` and ``peers`` are Python executables; ``data`` holds the model and the questions.

    ``scratch`` is a folder for jobs. Every process computes with ``threads`` torch threads;
    ``cores`` is how many Ray actors Flower gets. ``quick`` runs are for trying things out.
    """

    ours: str
    peers: str
    data: Path
    scratch: Path
    records: Path
    threads: int
    cores: int
    quick: bool
    versions: Mapping[str, str]

    def job(self, config: RunConfig, name: str, rounds: int) -> Path:
        """The folder of a job of this name: the first ``rounds`` rounds of this run."""
        folder = self.scratch / name
        return write_job(config, folder, rounds, threads=self.threads, actors=self.cores)

    def party(self, module: str, *words: object, name: str | None = None, every: int = 1) -> Party:
        """The party of a file in benchmarks/peers; rolora's own runs in rolora's Python."""
        our_own = any(str(word).startswith("rolora") for word in (module, *words[:1]))
        python = self.ours if our_own else self.peers
        command = (python, "-m", f"benchmarks.peers.{module}", *map(str, words))
        return Party(name or module, command, 1 if self.quick else every)

    def measured(
        self,
        bench: str,
        parties: Sequence[Party],
        repetitions: int,
        check: Callable[[], Mapping[str, Any]] = dict,
        **setting: Any,
    ) -> None:
        """Measure and write the record; a quick run does two repetitions.

        ``check`` looks at what the parties left behind; what it finds is recorded too.
        """
        repetitions = 2 if self.quick else repetitions
        machine = {**harness.machine(), "versions": dict(self.versions)}
        outcomes = harness.measure(parties, repetitions, self.environment())
        own = {"threads": self.threads, "cores": self.cores, "quick": self.quick}
        harness.write_record(self.records, bench, outcomes, {**own, **setting, **check()}, machine)

    def environment(self) -> dict[str, str]:
        """The same for every party."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        }

    def model(self) -> Path:
        """The MiniLM encoder, fetched once, as the demonstration fetches it."""
        return fetch("minilm", self.data).resolve()

    def questions(self) -> tuple[Path, Path]:
        """The TREC questions, train and test."""
        folder = fetch("trec", self.data).resolve()
        return folder / "train.csv", folder / "test.csv"
