"""Claims about the engines: who trains in a round, what each keeps, and what it sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from states import Cohort, assign, relative, same
from tiny import tiny_bert
from tiny_clients import SHARDS, Bench, classifier

from rolora.algorithm.adapter import AdapterState, Assignment, ClientInfo, Failure, Update, role_of
from rolora.algorithm.choices import Format
from rolora.algorithm.method import Method, ServerState, freeze_head
from rolora.data.examples import Examples
from rolora.data.partition import client_ids
from rolora.errors import RoloraError
from rolora.methods import get_method, method_names
from rolora.methods.centralized import POOL
from rolora.training.client_store import ClientStore
from rolora.training.engine import Debug, Engine, Evaluation, InProcess, Job
from rolora.training.local import Trained, Work, evaluate
from rolora.training.settings import LocalSettings

SETTINGS = LocalSettings(steps=None, epochs=1, batch_size=4)
IDS = list(SHARDS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tiny_bert(tmp_path_factory.mktemp("models") / "bert")
    return classifier(folder, torch.float32, dropout=0.1)


def engine_of(bench: Bench, folder: Path, **changes: Any) -> InProcess:
    store = ClientStore(folder / "clients")
    engine = InProcess(bench.base, bench.task, bench.examples, SHARDS, SETTINGS, store)
    return replace(engine, **changes)


def debug_of(bench: Bench, folder: Path) -> Debug:
    return Debug(**vars(engine_of(bench, folder)))


def job_of(bench: Bench, round: int = 1, method: str = "fedit") -> Job:
    chosen = get_method(method)
    server = ServerState(bench.start_of(chosen), round=round - 1)
    cohort = cohort_at(chosen, server, IDS)
    return Job(server, tuple(cohort.values()), seed=7, lr=5e-3)


def cohort_at(
    method: Method,
    server: ServerState,
    drawn: Iterable[str],
    shards: Mapping[str, torch.Tensor] = SHARDS,
) -> Cohort:
    infos = tuple(ClientInfo(id, len(shards[id]), 2, server.round + 1) for id in drawn)
    return assign(method, server, method.cohort(infos, sum(map(len, shards.values()))))


def updates_of(found: Iterable[Update | Failure]) -> dict[str, Update]:
    updates = [update for update in found if isinstance(update, Update)]
    assert len({update.client for update in updates}) == len(updates)
    return {update.client: update for update in updates}


def run(engine: Engine, method: Method, job: Job) -> dict[str, Update]:
    return updates_of(engine.run(method, job))


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("name", method_names())
def test_both_engines_send_the_same_bits_when_clients_go_one_at_a_time(
    bench: Bench, tmp_path: Path, name: str, round: int
) -> None:
    method, job = get_method(name), job_of(bench, round, name)
    found = run(engine_of(bench, tmp_path, bank_size=1), method, job)
    debug = run(debug_of(bench, tmp_path), method, job)
    assert found.keys() == debug.keys()
    for client, update in found.items():
        assert same(update.adapter, debug[client].adapter)
        assert update.metrics == debug[client].metrics
        assert update.num_examples == debug[client].num_examples


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_the_size_of_the_bank_changes_updates_by_rounding_only(
    bench: Bench, tmp_path: Path, size: int
) -> None:
    method, job = get_method("fedit"), job_of(bench)
    one_by_one = run(debug_of(bench, tmp_path), method, job)
    found = run(engine_of(bench, tmp_path, bank_size=size), method, job)
    assert found.keys() == one_by_one.keys() == SHARDS.keys()
    for client, update in found.items():
        assert relative(update.adapter, one_by_one[client].adapter) <= 1e-5
        assert update.metrics == pytest.approx(one_by_one[client].metrics, rel=1e-5)
        assert update.num_examples == len(SHARDS[client])


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("name", method_names())
def test_an_update_holds_what_is_shared_and_nothing_else(
    bench: Bench, tmp_path: Path, name: str, round: int, frozen_head: bool
) -> None:
    method = freeze_head(get_method(name)) if frozen_head else get_method(name)
    job = job_of(bench, round, name)
    for update in run(engine_of(bench, tmp_path), method, job).values():
        assert {role_of(key) for key in update.adapter} == method.shared(round)
        assert update.adapter.keys() == job.server.adapter.only(method.shared(round)).keys()
        assert update.metrics.keys() == {"loss", "steps", "moved"}
        trained = [method.trainable(round, s) for s in range(int(update.metrics["steps"]))]
        moved = {k for k, t in update.adapter.items() if not torch.equal(t, job.server.adapter[k])}
        assert bool(moved) == bool(update.adapter)
        assert update.metrics["moved"] >= max(len(moved), 1)
        assert {role_of(key) for key in moved} <= frozenset().union(*trained)


def test_centralized_trains_once_on_all_rows_with_the_steps_of_the_cohort(
    bench: Bench, tmp_path: Path
) -> None:
    groups: list[list[Work]] = []

    class Watched(InProcess):
        def train(self, method: Method, job: Job, work: Any) -> Any:
            groups.append(list(work))
            return super().train(method, job, work)

    engine = Watched(**vars(engine_of(bench, tmp_path)))
    method, job = get_method("centralized"), job_of(bench)
    cohort = cohort_at(method, job.server, IDS[:3])
    updates = run(engine, method, replace(job, cohort=tuple(cohort.values())))
    assert list(updates) == [POOL]
    assert updates[POOL].num_examples == 23
    ((work,),) = groups
    assert sorted(work.rows.tolist()) == list(range(23))  # dan's row too: rows are in one place
    assert work.steps == 2 + 1 + 4 == updates[POOL].metrics["steps"]


def test_the_pool_s_name_is_no_client_s(bench: Bench, tmp_path: Path) -> None:
    assert POOL not in client_ids([POOL, "all", "(ALL)"]).values()
    shards = {"all": torch.arange(4), "bob": torch.arange(4, 12)}
    cohort = cohort_at(get_method("fedit"), job_of(bench).server, shards, shards)
    work = engine_of(bench, tmp_path, shards=shards).prepare(cohort["all"])
    assert torch.equal(work.rows, shards["all"])
    assert work.steps == 1


@pytest.mark.parametrize("stage", ["prepare", "train", "check", "finish"])
def test_the_debug_engine_names_client_round_and_stage(
    bench: Bench, tmp_path: Path, stage: str
) -> None:
    class Broken(Debug):
        def prepare(self, assigned: Assignment) -> Work:
            if (stage, assigned.info.id) == ("prepare", "bob"):
                raise KeyError("no rows")
            return super().prepare(assigned)

        def train(self, method: Method, job: Job, work: Any) -> Any:
            done = super().train(method, job, work)
            if work[0].client != "bob" or stage not in ("train", "check"):
                return done
            if stage == "train":
                raise ValueError("a shape")
            return [replace(done[0], adapter=bench.start(99))]

        def finish(
            self, method: Method, assigned: Assignment, trained: Trained
        ) -> Update | Failure:
            if (stage, assigned.info.id) == ("finish", "bob"):
                raise OSError("no space")
            return super().finish(method, assigned, trained)

    engine = Broken(**vars(engine_of(bench, tmp_path)))
    updates = engine.run(get_method("ffa_lora"), job_of(bench, round=3))
    assert next(updates).client == "ann"
    message = rf"^round 3, client 'bob', stage '{stage}': \w+: "
    with pytest.raises(RoloraError, match=message) as caught:
        next(updates)
    assert "\n" not in str(caught.value)
    assert (stage == "check") == ("frozen tensor" in str(caught.value))


def stored(value: float) -> AdapterState:
    return AdapterState({"x.lora_A.weight": torch.full((2, 3), float(value))}, {"x": 1.0})


def test_a_store_gives_the_state_after_the_last_round_before_this_one(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.read("ann", before=1) == {}
    for round in (1, 2, 5):
        store.write("ann", round, stored(round))
    for before, value in ((2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 5.0), (99, 5.0)):
        assert same(store.read("ann", before), stored(value))
    assert store.read("bob", before=9) == {}


def test_a_store_forgets_rounds_that_are_run_again_and_old_ones(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for round in (1, 2, 3, 4, 5):
        store.write("ann", round, stored(round))
    assert same(store.read("ann", before=4), stored(3))
    assert len(list((tmp_path / "ann").iterdir())) == 3
    store.write("ann", 4, stored(44))  # the run went back to round 4: round 5 never happened
    assert same(store.read("ann", before=9), stored(44))
    assert same(store.read("ann", before=4), stored(3))


def test_a_retried_round_starts_where_the_first_try_started(bench: Bench, tmp_path: Path) -> None:
    engine, method = engine_of(bench, tmp_path, bank_size=1), get_method("local")
    run(engine, method, job_of(bench, 1))
    job = job_of(bench, 2)
    first_round = engine.store.read("cat", before=2)
    starts, ends, losses = [], [], []
    for _ in range(2):
        starts.append(engine.prepare(job.cohort[2]).start)
        losses.append(run(engine, method, job)["cat"].metrics["loss"])
        ends.append(engine.store.read("cat", before=3))
    assert same(starts[0], starts[1])
    assert same(starts[0], first_round)
    assert losses[0] == losses[1]
    assert same(ends[0], ends[1])
    assert not same(ends[0], starts[0])


def test_in_fp32_the_trained_values_are_sent_as_they_are_and_nothing_is_kept(
    bench: Bench, tmp_path: Path
) -> None:
    engine, method, job = engine_of(bench, tmp_path), get_method("rolora"), job_of(bench)
    work = [engine.prepare(assigned) for assigned in job.cohort]
    trained = engine.train(method, job, work)
    for update, one in zip(engine.run(method, job), trained, strict=True):
        assert isinstance(update, Update)
        assert same(update.adapter, one.adapter.only(method.shared(1)))
        assert update.num_bytes() == update.adapter.num_bytes()
    assert not engine.store.folder.exists()


@pytest.mark.parametrize(("up", "largest"), [("int8", 127), ("int4", 7)])
def test_the_size_of_the_bank_changes_what_arrives_encoded_by_one_step_at_most(
    bench: Bench, tmp_path: Path, up: Format, largest: int
) -> None:
    method, job = get_method("fedit"), job_of(bench)
    found = [
        run(engine_of(bench, tmp_path / f"{size}", up=up, bank_size=size), method, job)
        for size in (1, 3)
    ]
    for client in SHARDS:
        for name, tensor in found[0][client].adapter.items():
            step = float((tensor - job.server.adapter[name]).abs().max()) / largest * 1.01
            assert float((tensor - found[1][client].adapter[name]).abs().max()) <= step


def test_what_an_upload_rounded_away_waits_for_the_next_upload_of_the_same_tensor(
    bench: Bench, tmp_path: Path
) -> None:
    engine, method = engine_of(bench, tmp_path, bank_size=1, up="int4"), get_method("rolora")
    store = ClientStore(engine.store.folder, kind="residual")
    kept = {1: store.read("ann", before=1)}
    for round in (1, 2, 3):
        job = job_of(bench, round)
        (trained, *_) = engine.train(method, job, [engine.prepare(job.cohort[0])])
        arrived = run(engine, method, job)["ann"].adapter
        kept[round + 1] = store.read("ann", before=round + 1)
        for name in arrived:
            wanted = trained.adapter[name].double() + kept[round].get(name, torch.tensor(0.0))
            left = kept[round + 1][name].double()
            assert float((wanted - arrived[name] - left).abs().max()) <= 1e-6
            assert float(left.abs().max()) > 1e-5
        assert all(
            torch.equal(kept[round + 1][name], tensor)
            for name, tensor in kept[round].items()
            if name not in arrived
        )
    roles = [{role_of(name) for name in kept[before]} for before in (1, 2, 3, 4)]
    assert roles == [set(), {"B", "head"}, {"A", "B", "head"}, {"A", "B", "head"}]


def test_a_retried_round_sends_the_same_bits_encoded_as_the_first_try(
    bench: Bench, tmp_path: Path
) -> None:
    engine, method = engine_of(bench, tmp_path, bank_size=1, up="int8"), get_method("fedit")
    run(engine, method, job_of(bench, 1))
    first, again = (run(engine, method, job_of(bench, 2))["cat"].adapter for _ in range(2))
    assert same(first, again)


def test_an_upload_that_cannot_be_encoded_is_that_client_s_failure_and_changes_nothing_it_kept(
    bench: Bench, tmp_path: Path
) -> None:
    class Overflowing(InProcess):
        def train(self, method: Method, job: Job, work: Any) -> Any:
            done = super().train(method, job, work)
            name = min(done[1].adapter.only(method.shared(job.round)))
            bad = done[1].adapter | {name: done[1].adapter[name] * torch.inf}
            return [done[0], replace(done[1], adapter=bad), *done[2:]]

    engine = Overflowing(**vars(engine_of(bench, tmp_path, up="int8")))
    replies = list(engine.run(get_method("rolora"), job_of(bench)))
    name = min(job_of(bench).server.adapter.only(get_method("rolora").shared(1)))
    assert replies[1] == Failure("bob", f"{name} has values that are not finite")
    assert [reply.client for reply in replies if isinstance(reply, Update)] == ["ann", "cat", "dan"]
    assert {path.name for path in engine.store.folder.iterdir()} == {"ann", "cat", "dan"}


def test_each_client_is_evaluated_on_its_own_rows_with_its_own_factors(
    bench: Bench, tmp_path: Path
) -> None:
    held_out = {
        "ann": rows_of(bench, ["the cat", "a good film"]),
        "bob": rows_of(bench, ["no heart at all", "thin plot", "a dog"]),
    }
    test = rows_of(bench, ["a bad film", "the mat", "a clever plot and a dog"])
    engine = engine_of(
        bench,
        tmp_path,
        held_out=held_out.get,
        evaluation=lambda adapter: Evaluation(score(bench, test, adapter)),
    )
    method, job = get_method("local"), job_of(bench)
    run(engine, method, job)
    for metrics in Debug(**vars(engine)).evaluate(method, job.cohort):
        kept = job.server.adapter | engine.store.read(metrics.client, before=2)
        own = held_out.get(metrics.client)
        assert metrics.held_out == ({} if own is None else score(bench, own, kept))
        assert metrics.server.metrics == score(bench, test, kept)
    for metrics in engine.evaluate(get_method("fedit"), job.cohort):
        own = held_out.get(metrics.client)
        assert metrics.server == Evaluation()  # there is but one adapter: the server tests it
        assert (metrics.held_out == {}) == (own is None)


def score(bench: Bench, examples: Examples, adapter: AdapterState) -> dict[str, float]:
    return evaluate(bench.base, bench.task, examples, adapter)


def rows_of(bench: Bench, texts: list[str]) -> Examples:
    labels = ["bad", "good", "odd"][: len(texts)]
    return bench.task.encode_test(pa.table({"text": texts, "label": labels}), "rows")
