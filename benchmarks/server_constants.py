"""What the server's part of a round costs: seconds per update, memory bandwidth, bytes per client.

    python benchmarks/server_constants.py

Clients here only pretend to train: each sends a random update of the adapter's true shapes, so that
everything timed is the server's (checking, summing, the aggregation error, the ledger, the
checkpoint). Seconds are of one thread of the processor, so that neighbours on a shared machine
count little; a checkpoint's are of the clock, since it waits for the disk. Writes
benchmarks/records/server_constants.json, from which docs/make_scale.py writes the tables of
docs/scale.md.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Assignment, Specs, TensorSpec, Update
from rolora.algorithm.method import Method, ServerState, lora_init
from rolora.algorithm.reduce import add_, mean, zeros_like
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation
from rolora.files import write_file
from rolora.methods import get_method
from rolora.run.folder import RunFolder
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import Federation, RoundResult, RunState, federate, sample_cohort

RECORD = Path(__file__).parent / "records" / "server_constants.json"
METHODS = ("rolora", "ffa_lora", "fedit")
HEADS = {"minilm": {"classifier.weight": (6, 384), "classifier.bias": (6,)}}
# name -> layers, width, rank; query and value of every layer, as in the paper
SHAPES = {"minilm": (6, 384, 4), "roberta_large": (24, 1024, 4), "llama_2_7b": (32, 4096, 8)}
COHORTS = {"minilm": (10, 50), "roberta_large": (10, 50), "llama_2_7b": (4, 12)}


def specs_of(shape: str) -> Specs:
    """The adapter of a model of this shape, with MiniLM's classifier where it is MiniLM."""
    layers, width, rank = SHAPES[shape]
    tensors, scaling = [], {}
    for index in range(layers):
        for module in ("query", "value"):
            layer = f"base_model.model.layer.{index}.{module}"
            tensors.append(TensorSpec(f"{layer}.lora_A.weight", "A", (rank, width)))
            tensors.append(TensorSpec(f"{layer}.lora_B.weight", "B", (width, rank)))
            scaling[layer] = 2.0
    for name, size in HEADS.get(shape, {}).items():
        tensors.append(TensorSpec(f"base_model.model.{name}", "head", size))
    return Specs(tuple(tensors), scaling, {})


@dataclass
class Pretended:
    """Clients that send one of a few updates made beforehand; ``spent`` counts their seconds."""

    pool: Sequence[AdapterState]
    count: int = 0
    spent: float = 0.0

    def clients(self) -> Mapping[str, int]:
        """All hold 8 rows."""
        return {f"client-{i:07d}": 8 for i in range(self.count)}

    def run(self, method: Method, job: Job) -> Iterator[Update]:
        for index, assigned in enumerate(job.cohort):
            client, began = assigned.info, time.process_time()
            sent = self.pool[index % len(self.pool)].only(method.shared(job.round))
            self.spent += time.process_time() - began
            yield Update(client.id, sent, client.num_examples, {"loss": 1.0, "steps": 1.0})

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        yield from ()


def federation(
    engine: Pretended, method: str, clients: int, cohort: int, rounds: int
) -> Federation:
    """This many clients, of whom a cohort takes part in a round."""
    engine.count = clients
    return Federation(
        method=get_method(method),
        engine=engine,
        aggregation=Aggregation(mean()),
        ranks=lambda clients: dict.fromkeys(clients, 4),
        seed=0,
        rounds=rounds,
        lr=lambda round: 0.1,
        participation=cohort / clients,
        eval_every=rounds,
    )


def near(start: AdapterState, seed: int) -> AdapterState:
    """Another adapter of the same shapes."""
    rng = generator(seed, "pretended")
    moved = {n: t + 0.01 * torch.randn(t.shape, generator=rng) for n, t in start.items()}
    return AdapterState(moved, start.scaling)


def rounds_of(shape: str, method: str, cohort: int, rounds: int = 7) -> dict[str, float]:
    """Least CPU seconds of a round, seconds of its checkpoint, steady bytes; phases averaged."""
    start = lora_init(specs_of(shape), generator(0, "init"))
    engine = Pretended([near(start, seed) for seed in range(4)])
    took: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    last: list[RoundResult] = []
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", "", {}, {})
        began = time.process_time()
        run = federation(engine, method, cohort, cohort, rounds)
        for result in federate(run, RunState(ServerState(start))):
            arrived, engine.spent, waited = time.process_time(), 0.0, engine.spent
            saving = time.perf_counter()
            folder.commit(result)
            if result.round > 1:
                took[result.round % 2].append(
                    (arrived - began - waited, time.perf_counter() - saving)
                )
            last = [*last[-1:], result]
            began = time.process_time()
    best = [[min(column) for column in zip(*took[phase], strict=True)] for phase in (0, 1)]
    return {
        "round_seconds": sum(one[0] for one in best) / 2,
        "checkpoint_seconds": sum(one[1] for one in best) / 2,
        "bytes_up": sum(result.bytes_up for result in last) / 2 / cohort,
        "bytes_down": sum(result.bytes_down for result in last) / 2 / cohort,
    }


def costs(shape: str, method: str) -> dict[str, float]:
    """Seconds a client adds to a round, seconds a round costs without any, bytes a client."""
    few, many = COHORTS[shape]
    one, other = rounds_of(shape, method, few), rounds_of(shape, method, many)
    slope = (other["round_seconds"] - one["round_seconds"]) / (many - few)
    return {
        "cohort": many,
        "round_seconds": other["round_seconds"],
        "seconds_per_update": slope,
        "seconds_per_round": max(0.0, one["round_seconds"] - few * slope),
        "checkpoint_seconds": other["checkpoint_seconds"],
        "bytes_up": other["bytes_up"],
        "bytes_down": other["bytes_down"],
    }


def best_of(work: Callable[[], object], times: int = 5) -> float:
    """The least CPU seconds of some tries, after one that warms up."""
    work()
    took = []
    for _ in range(times):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def bandwidth() -> float:
    """Bytes a second that one thread reads from memory: a float32 sum over 512 MiB."""
    many = torch.ones(1 << 27)
    return many.numel() * 4 / best_of(many.sum)


def summing(shape: str, dtype: torch.dtype) -> float:
    """Bytes of float32 updates a second that go into a running sum of this dtype."""
    start = lora_init(specs_of(shape), generator(0, "init"))
    updates: list[list[Tensor]] = []
    held, wanted = 0, 256 << 20  # together larger than a core's share of the cache
    while held < wanted and len(updates) < 600:
        updates.append(list(near(start, len(updates)).values()))
        held += start.num_bytes()
    totals = zeros_like(updates[0], dtype)

    def work() -> None:
        for update in updates:
            add_(totals, update, 3.0)

    return held / best_of(work)


def waiting(clients: int, rounds: int = 20, cohort: int = 10) -> dict[str, float]:
    """What clients that wait, and clients that took part once, cost a round."""
    start = lora_init(specs_of("minilm"), generator(0, "init"))
    ids = [f"client-{i:07d}" for i in range(clients)]
    engine = Pretended([near(start, seed) for seed in range(4)])
    run = federation(engine, "rolora", clients, cohort, rounds)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", "", {}, {})
        took, sizes = [], []
        began = time.process_time()
        for result in federate(run, RunState(ServerState(start))):
            folder.commit(result)
            took.append(time.process_time() - began)
            (newest,) = folder.path.glob(f"checkpoints/*-{result.round:06d}/manifest.json")
            sizes.append(newest.stat().st_size)
            began = time.process_time()
    draw = best_of(lambda: sample_cohort(ids, cohort / clients, 0, 1, 0), 3)
    grown = (sizes[-1] - sizes[2]) / (len(result.state.ledger.held) - 2 * cohort)
    return {
        "clients": clients,
        "round_seconds": sorted(took[1:])[len(took) // 2],
        "draw_seconds": draw,
        "manifest_bytes": sizes[-1],
        "manifest_bytes_per_client_that_took_part": grown,
    }


def main() -> None:
    """Measure everything and write the record."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "machine": {
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "read_bytes_per_second": bandwidth(),
        },
        "summing": {
            shape: {
                "float32": summing(shape, torch.float32),
                "float64": summing(shape, torch.float64),
            }
            for shape in SHAPES
        },
        "waiting": [waiting(clients) for clients in (10, 1_000, 10_000, 1_000_000)],
        "adapters": {},
    }
    for shape in SHAPES:
        adapter = lora_init(specs_of(shape), generator(0, "init"))
        found: Mapping[str, Any] = {method: costs(shape, method) for method in METHODS}
        parameters = sum(tensor.numel() for tensor in adapter.values())
        record["adapters"][shape] = {"parameters": parameters, "methods": found}
    RECORD.parent.mkdir(exist_ok=True)
    write_file(RECORD, json.dumps(record, indent=1) + "\n")
    print(RECORD.read_text())


if __name__ == "__main__":
    main()
