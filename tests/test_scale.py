"""Many clients: those that wait cost a round nothing, those that take part cost additions."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import script
from states import cohort_of, dense, make_specs, random_state, sent, trained, updates_from
from tiny_site import write_rows

from rolora.algorithm.adapter import AdapterState, ClientInfo, Failure, Update
from rolora.algorithm.exactness import Products, norm
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.reduce import Memory, Reducer, Value, mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.config.load import load_config
from rolora.methods import get_method
from rolora.run import runs
from rolora.run.folder import RunFolder
from rolora.tasks import classification
from rolora.tasks.registry import Task
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import Federation, RunState, federate

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).parent.parent
SPECS = make_specs()
FEDIT = get_method("fedit")


@dataclass(frozen=True)
class Pretended:
    """Clients that move at random what they train."""

    count: int

    def clients(self) -> Mapping[str, int]:
        return {f"client-{i:06d}": 8 for i in range(self.count)}

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        for seed, assigned in enumerate(job.cohort):
            yield sent(method, assigned, trained(method, assigned, seed))

    def evaluate(self, *_: Any) -> Iterator[ClientMetrics]:
        yield from ()


def work(clients: int, folder: Path, method: str = "rolora") -> tuple[Counter[str], list[int]]:
    """Calls made, and bytes of the manifest, over four rounds of ten of these clients."""
    calls: Counter[str] = Counter()
    inner, plain = mean(), get_method(method)

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        calls["elements added"] += sum(tensor.numel() for tensor in value.values())
        return inner.add(memory, value, reference, weight)

    def download(server: ServerState, client: ClientInfo) -> AdapterState:
        calls["downloads"] += 1
        return plain.download(server, client)

    run = Federation(
        method=replace(plain, download=download),
        engine=Pretended(clients),
        aggregation=Aggregation(Reducer(inner.init, add, inner.finish)),
        ranks=lambda clients: dict.fromkeys(clients, 2),
        seed=0,
        rounds=4,
        lr=lambda round: 0.1,
        participation=10 / clients,
    )
    record, sizes = RunFolder.create(folder, "", {}, {}), []
    for result in federate(run, RunState(ServerState(random_state(SPECS, 0)))):
        record.commit(replace(result, seconds=0.0))
        (path,) = folder.glob(f"checkpoints/round-{result.round:06d}/manifest.json")
        text = json.loads(path.read_text())
        sizes.append(len(json.dumps({**text, "line": None})))
    return calls, sizes


def test_a_round_of_ten_clients_does_the_same_work_with_ten_thousand_others_waiting(
    tmp_path: Path,
) -> None:
    few, small = work(10, tmp_path / "few")
    many, large = work(10_010, tmp_path / "many")
    assert few == many
    assert few["downloads"] == 4 * 10
    assert large[0] == small[0]  # before anybody has taken part
    assert abs(large[1] - small[1]) <= 20  # the digits of an error
    assert large[4] - small[4] < 40 * 30  # 30 more clients have taken part, one line each


def test_a_round_hashes_no_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(tensor: torch.Tensor) -> str:
        raise AssertionError("a tensor was hashed")

    for module in [module for name, module in sys.modules.items() if name.startswith("rolora")]:
        if hasattr(module, "tensor_hash"):
            monkeypatch.setattr(module, "tensor_hash", refuse)
    for name in ("rolora", "fedit", "local"):
        work(10, tmp_path / name, name)


@pytest.mark.parametrize("name", ["rolora", "ffa_lora"])
def test_where_a_factor_is_frozen_a_round_decomposes_once_however_many_clients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, server = get_method(name), ServerState(random_state(SPECS, 0))
    sizes: list[tuple[int, ...]] = []
    qr = torch.linalg.qr

    def counted(matrix: torch.Tensor, mode: str) -> Any:
        sizes.append(tuple(matrix.shape))
        return qr(matrix, mode=mode)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    found = []
    for clients in (2, 40):
        sizes.clear()
        cohort = cohort_of(method, server, {f"c{i:02d}": 5 for i in range(clients)})
        updates = updates_from(method, cohort)
        step(method, Aggregation(mean()), server, cohort, updates, generator(0))
        found.append(list(sizes))
    assert found[0] == found[1] != []


@pytest.mark.parametrize("moving", ["A", "B", "both", "mixed"])
def test_a_stream_of_products_sums_to_the_dense_sum(moving: str) -> None:
    common = random_state(SPECS, 0)
    total, expected = Products(common), {layer: 0 * m for layer, m in dense(common).items()}
    for client in range(40):
        roles = {"mixed": ("A", "B", "both")[client % 3]}.get(moving, moving)
        other = random_state(SPECS, client + 1)
        state = common | (other if roles == "both" else other.only(frozenset({roles})))  # type: ignore[arg-type]
        total.add(state, client + 1.0)
        for layer, matrix in dense(state).items():
            expected[layer] += (client + 1.0) * matrix
    for layer, low_rank in total.total().items():
        torch.testing.assert_close(low_rank.dense(), expected[layer], rtol=1e-10, atol=1e-10)
        if moving in "AB":
            assert len(low_rank.terms) == 1
    whole = float(sum(matrix.square().sum() for matrix in expected.values())) ** 0.5
    assert norm(total.total()) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("name", ["rolora", "fedit"])
def test_the_error_is_measured_from_what_each_client_received(name: str) -> None:
    def own(server: ServerState, client: ClientInfo) -> AdapterState:
        other = random_state(SPECS, len(client.id), torch.float64, 0.1)
        return server.adapter | {n: t + other[n] for n, t in server.adapter.items()}

    method = replace(get_method(name), download=own)
    server = ServerState(random_state(SPECS, 0, torch.float64))
    cohort = cohort_of(method, server, {"a": 3, "bb": 5, "ccc": 4})
    held = {id: trained(method, one, 7 + len(id)) for id, one in cohort.items()}
    updates = [sent(method, one, held[id]) for id, one in cohort.items()]
    after, report = step(method, Aggregation(mean()), server, cohort, updates, generator(0))
    missed = whole = 0.0
    for layer, now in dense(after.adapter).items():
        change = sum(
            one.info.num_examples / 12 * (dense(held[id])[layer] - dense(one.received)[layer])
            for id, one in cohort.items()
        )
        product = sum(
            one.info.num_examples / 12 * dense(held[id])[layer] for id, one in cohort.items()
        )
        assert isinstance(change, torch.Tensor)
        assert isinstance(product, torch.Tensor)
        missed += float((change - (now - dense(server.adapter)[layer])).square().sum())
        whole += float(product.square().sum())
    assert report.aggregation_error == pytest.approx((missed / whole) ** 0.5, rel=1e-9)


def test_held_out_rows_are_tokenised_only_for_the_client_that_is_measured(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(site.parent / "many.csv", 400)
    changes = ["data.train=many.csv", "data.client_test=0.5", "partition.scheme=iid"]
    config = load_config(site, [*changes, "partition.clients=100"])
    encoded: list[int] = []
    made = classification.classification

    def watched(*given: Any, **more: Any) -> Task:
        task = made(*given, **more)

        def encode_test(table: Any, source: str) -> Any:
            encoded.append(table.num_rows)
            return task.encode_test(table, source)

        return replace(task, encode_test=encode_test)

    monkeypatch.setattr("rolora.tasks.classification.classification", watched)
    setup = runs.start(config, tmp_path / "run").experiment
    setup.prepare()
    assert encoded == [12]  # the test file
    found = setup.held_out("client-007")
    assert found is not None
    assert len(found) == 2
    assert encoded == [12, 2]


def test_the_tables_of_the_page_on_scale_are_those_of_the_record() -> None:
    module = script("docs/make_scale.py")
    text = (ROOT / "docs" / "scale.md").read_text()
    assert text == module.page(text, json.loads(module.RECORD.read_text()))
