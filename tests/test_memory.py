"""Claims about how many clients train at once, and what a pass keeps for its backward part."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from states import relative
from tiny_clients import Bench, classifier, language_model
from tiny_site import make_site

from rolora.algorithm.adapter import Roles
from rolora.config.load import load_config
from rolora.errors import ConfigError, RoloraError
from rolora.run import runs
from rolora.training import engine, memory
from rolora.training.local import Trained, Work, train_group
from rolora.training.memory import BankPlan, activation_bytes, plan_bank
from rolora.training.settings import LocalSettings

pytestmark = pytest.mark.usefixtures("quick")

PHASES: Mapping[str, Roles] = {"B": frozenset({"B"}), "A": frozenset({"A"})}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return classifier(tiny.tiny_bert(tmp_path_factory.mktemp("memory") / "model"))


def plan(bench: Bench, batch_size: int = 4, clients: int = 1000, **more: Any) -> BankPlan:
    return plan_bank(
        bench.base, bench.task, bench.examples, bench.start(), PHASES, batch_size, clients, **more
    )


def test_auto_gives_the_processor_about_the_tokens_that_keep_it_busy(bench: Bench) -> None:
    found = plan(bench)
    assert 0.8 * 1024 <= found.tokens <= 1024
    assert plan(bench, batch_size=8).clients == pytest.approx(found.clients / 2, abs=1)
    assert plan(bench, clients=3).clients == 3


@pytest.mark.parametrize(
    ("clients", "tokens", "size"),
    [(50, 60, 13), (50, 40, 25), (50, 20, 50), (3, 1000, 1), (7, 300, 2), (1, 5000, 1)],
)
def test_auto_trains_in_one_pass_or_an_even_number_so_that_no_worker_of_two_waits(
    clients: int, tokens: int, size: int
) -> None:
    assert memory.bank_size("cpu", tokens, 1, 10**9, clients) == size
    passes = math.ceil(clients / size)
    assert passes == 1 or passes % 2 == 0 or size == 1


def test_no_more_clients_go_at_once_than_fit_in_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = max(plan(bench, clients=1).activations.values())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 5 * each)
    assert plan(bench, wanted=64).clients == 5
    assert max(plan(bench, wanted=64).activations.values()) == 5 * each
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert plan(bench, wanted=64).clients == 1


def test_a_bank_that_does_not_fit_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    config = load_config(make_site(tmp_path), ["train.bank=3"])
    notes = runs.start(config, tmp_path / "run").notes
    assert any(n.startswith("train.bank = 3 does not fit in memory; 1 clients") for n in notes)


@pytest.mark.parametrize("make", [classifier, language_model])
def test_recomputing_layers_keeps_less_and_changes_nothing(make: Any, tmp_path: Path) -> None:
    name = "bert" if make is classifier else "llama"
    found: Bench = make(getattr(tiny, f"tiny_{name}")(tmp_path / "model"), dropout=0.2)
    settings = LocalSettings(steps=2, batch_size=4)
    results, kept = [], []
    assert found.base.stack is not None
    for again in (False, True):
        found.base.stack.checkpointing = again
        results.append(found.train(found.work(settings), settings))
        kept.append(
            activation_bytes(found.base, found.task, found.examples, found.start(), PHASES["A"], 4)
        )
    for one, other in zip(*results, strict=True):
        assert relative(one.adapter, other.adapter) <= 1e-12
    assert kept[1] < 0.7 * kept[0]


def test_recomputing_is_refused_where_the_layers_cannot_be_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rolora.model.base.take_over", lambda *_, **__: None)
    config = load_config(make_site(tmp_path), ["train.recompute=true"])
    with pytest.raises(ConfigError, match=r"this model does not support train\.recompute"):
        runs.start(config, tmp_path / "run")


def starving(most: int, seen: list[int], message: str) -> Any:
    def train(base: Any, task: Any, examples: Any, work: Sequence[Work], *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        seen.append(len(work))
        if len(work) > most:
            raise RuntimeError(message)
        found: list[Trained] = train_group(base, task, examples, work, *args, **kwargs)
        return found

    return train


FULL = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"


def test_clients_that_run_out_of_memory_go_on_by_halves_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(make_site(tmp_path), ["train.participation=1.0", "train.rounds=2"])
    whole = list(runs.start(config, tmp_path / "whole").rounds())[-1]
    seen: list[int] = []
    monkeypatch.setattr(engine, "train_group", starving(2, seen, FULL))
    with caplog.at_level(logging.WARNING):
        halved = list(runs.start(config, tmp_path / "halved").rounds())[-1]
    assert relative(halved.state.server.adapter, whole.state.server.adapter) <= 1e-4
    assert [r.message for r in caplog.records] == [
        "5 clients at once do not fit in memory: continuing with 2"
    ]
    assert seen == [5, 2, 2, 1, 2, 2, 1]


def test_one_client_that_does_not_fit_ends_the_run_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.start(load_config(make_site(tmp_path)), tmp_path / "run")
    monkeypatch.setattr(engine, "train_group", starving(0, [], FULL))
    with pytest.raises(RoloraError, match=r"one client's step does not fit .* train\.batch_size"):
        list(run.rounds())


def test_an_error_that_is_not_about_memory_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.start(load_config(make_site(tmp_path)), tmp_path / "run")
    monkeypatch.setattr(engine, "train_group", starving(0, [], "shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(run.rounds())
    assert torch.is_grad_enabled()
