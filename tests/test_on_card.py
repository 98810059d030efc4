"""Claims about training on GPUs, on stand-ins for them: see card.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import dispatch_model
from card import MixedDevices, OnCard, card
from states import relative
from tiny_clients import Bench, classifier, language_model
from tiny_site import make_site
from torch import Tensor

from rolora.algorithm.method import Method
from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.methods import get_method
from rolora.model.base import Base
from rolora.model.checkpoint import load_model
from rolora.model.prefix import kept_below
from rolora.model.stack import device_map
from rolora.run import runs
from rolora.run.experiment import Experiment
from rolora.tasks.generation import generate
from rolora.training.local import Trained, evaluate
from rolora.training.settings import LocalSettings

pytestmark = pytest.mark.usefixtures("quick")
SETTINGS = LocalSettings(steps=2, batch_size=4, max_grad_norm=1.0)
# transformers asks once a pass whether the rows of a decoder are packed, and GPT-2 whether they end
# in padding, of which it copies the columns' numbers first
OWN = {"llama": 1, "gpt2": 3}
Make = Callable[..., Bench]


def make(name: str, folder: Path, dtype: torch.dtype = torch.float64, **lora: Any) -> Bench:
    maker: Make = language_model if name in OWN else classifier
    return maker(getattr(tiny, f"tiny_{name}")(folder), dtype, **lora)


def place(base: Base, cards: int) -> None:
    """Put the base on a card, or its two layers on two."""
    model: Any = base.model
    where = device_map(model, [f"cuda:{index}" for index in range(cards)])
    assert where is not None
    for path, device in where.items():
        model.get_submodule(path).to(device)
    found = {parameter.device.index for parameter in model.parameters()}
    assert (base.device.type, found) == ("cuda", set(range(cards)))


def train(bench: Bench, method: Method, settings: LocalSettings, round: int = 1) -> list[Trained]:
    work = [replace(w, start=bench.start_of(method, i)) for i, w in enumerate(bench.work(settings))]
    return bench.train(work, settings, method=method, round=round)


def test_a_card_keeps_values_and_refuses_tensors_of_other_devices() -> None:
    with card() as waits:
        x = torch.arange(4.0).to("cuda", non_blocking=True)
        assert isinstance(x, OnCard)
        assert x.device == torch.zeros(2, device="cuda").device == torch.device("cuda", 0)
        assert waits.seen == []
        assert (x * 2).sum().item() == 12
        assert x.cpu().tolist() == [0, 1, 2, 3]
        assert len(waits.seen) == 2
        y = x.to("cuda:1")
        assert (y.device, (y + 1).device) == (torch.device("cuda", 1),) * 2
        assert len(waits.seen) == 2
        for other in (torch.ones(4), y, y.sum()):
            with pytest.raises(MixedDevices):
                x + other


@pytest.mark.parametrize(
    ("name", "method", "options", "cards"),
    [
        ("bert", "rolora", {}, 1),
        ("bert", "rolora", {"scaled": True}, 2),
        ("bert", "hetlora", {"gamma": 0.5}, 2),
        ("roberta", "la_lora", {}, 2),
        ("distilbert", "fed_sb", {}, 2),
        ("llama", "rolora", {}, 1),
        ("llama", "rolora", {}, 2),
        ("gpt2", "fedit", {}, 2),
    ],
)
def test_a_round_waits_for_the_card_as_often_whatever_its_steps_and_ends_as_on_a_cpu(
    name: str, method: str, options: dict[str, Any], cards: int, tmp_path: Path
) -> None:
    lora: dict[str, Any] = {"target_modules": ("q_lin", "v_lin")} if name == "distilbert" else {}
    bench = make(name, tmp_path / "model", dropout=0.1, **lora)
    made = get_method(method, **options)
    longer = replace(SETTINGS, steps=5)
    rounds = (1, 2)
    expected = [train(bench, made, SETTINGS, round) for round in rounds]
    with card() as waits:
        place(bench.base, cards)
        for round, exact in zip(rounds, expected, strict=True):
            counts = []
            for settings in (SETTINGS, longer):
                waits.seen.clear()
                found = train(bench, made, settings, round)
                counts.append(len(waits.seen))
                if settings is SETTINGS:
                    for one, other in zip(found, exact, strict=True):
                        assert relative(one.adapter, other.adapter) <= 1e-9
                        assert one.loss == pytest.approx(other.loss, rel=1e-10)
            assert counts[1] - counts[0] == 3 * OWN.get(name, 0), waits.seen


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_clients_that_leave_early_and_an_evaluation_stay_on_their_devices(
    name: str, tmp_path: Path
) -> None:
    bench = make(name, tmp_path / "model", torch.bfloat16)
    settings = replace(SETTINGS, steps=None, epochs=2, kept=frozenset({"A", "B"}))
    method = get_method("rolora")
    expected = train(bench, method, settings)
    scores = evaluate(bench.base, bench.task, bench.examples, expected[0].adapter)
    with card():
        place(bench.base, 2)
        found = train(bench, method, settings)
        there = evaluate(bench.base, bench.task, bench.examples, expected[0].adapter)
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.02)
    assert there["loss"] == pytest.approx(scores["loss"], rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packs", [False, True])
def test_layers_on_cards_run_packed_or_padded_and_again_in_the_backward_pass(
    packs: bool, recompute: bool, tmp_path: Path
) -> None:
    bench = make("llama", tmp_path / "model", dropout=0.1)
    stack = bench.base.stack
    assert stack is not None
    stack.window, stack.checkpointing = None if packs else 1, recompute
    method = get_method("rolora")
    expected = train(bench, method, SETTINGS)
    with card():
        place(bench.base, 2)
        found = train(bench, method, SETTINGS)
    for one, other in zip(found, expected, strict=True):
        assert relative(one.adapter, other.adapter) <= 1e-9


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_that_accelerate_runs_on_two_cards_is_taken_over_with_its_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Any, Any]] = []

    def loads(*args: Any, **more: Any) -> tuple[Any, Any]:
        loaded.append(load_model(*args, **more))
        return copy.deepcopy(loaded[0])

    def dispatches(*_: Any, device_map: Any, **__: Any) -> tuple[Any, Any]:
        """As from_pretrained would: what it does to load weights no stand-in can."""
        for path, device in device_map.items():
            loaded[0][0].get_submodule(path).to(device)
        return dispatch_model(loaded[0][0], device_map), loaded[0][1]

    monkeypatch.setattr("rolora.model.base.load_model", loads)
    bench = make(name, tmp_path / "model")
    expected = bench.train(bench.work(SETTINGS), SETTINGS)
    monkeypatch.setattr("rolora.model.base.load_model", dispatches)
    with card():
        base = make(name, tmp_path / "model", devices=["cuda:0", "cuda:1"]).base
        assert not any(hasattr(module, "_hf_hook") for module in base.model.modules())
        found = replace(bench, base=base).train(bench.work(SETTINGS), SETTINGS)
    for one, other in zip(found, expected, strict=True):
        assert relative(one.adapter, other.adapter) <= 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_on_cards_writes_what_it_writes_on_a_cpu(name: str, tmp_path: Path) -> None:
    bench = make(name, tmp_path / "model")
    asked = [bench.base.tokenizer(text)["input_ids"] for text in tiny.SENTENCES]
    with bench.base.holding(bench.start()):
        expected = generate(bench.base, asked, 8)
    assert len(set(expected)) > 1
    with card():
        place(bench.base, 2)
        with bench.base.holding(bench.start()):
            assert generate(bench.base, asked, 8) == expected


def test_frozen_layers_that_ran_once_on_cards_are_what_they_are_on_a_cpu(
    tmp_path: Path,
) -> None:
    bench = make("llama", tmp_path / "model", layers="top:1")

    def below() -> tuple[Tensor, float]:
        found, _ = kept_below(bench.base, bench.examples, tmp_path / bench.base.device.type)
        assert found.prefix is not None
        (one, *_) = replace(bench, examples=found).train(bench.work(SETTINGS), SETTINGS)
        return found.prefix, one.loss

    expected, loss = below()
    with card():
        place(bench.base, 2)
        found, there = below()
    assert relative({"prefix": found}, {"prefix": expected}) <= 1e-12
    assert there == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize(("method", "cards"), [("rolora", 1), ("rolora", 2), ("fed_sb", 2)])
def test_a_run_on_cards_starts_trains_evaluates_and_ends(
    method: str, cards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 1 << 31))
    changes = ["model.dtype=bf16", "train.lr=1e-2", f"method.name={method}"]
    config = load_config(make_site(tmp_path), changes)
    base = Experiment(config).load_base()

    def build(config: RunConfig, clients: Path) -> Experiment:
        return Experiment(config, clients, base=base)

    with card():
        place(base, cards)
        run = runs.start(config, tmp_path / "run", build)
        before, *_, last = [result.metrics["loss"] for result in run.rounds() if result.metrics]
    assert last < before
