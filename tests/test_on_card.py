"""Claims about training on a GPU, on a stand-in for one: see card.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from card import CARD, MixedDevices, OnCard, card
from states import relative
from tiny_clients import Bench, classifier, language_model
from tiny_site import make_site

from rolora.algorithm.method import Method
from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.methods import get_method
from rolora.run import runs
from rolora.run.experiment import Experiment
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


def train(bench: Bench, method: Method, settings: LocalSettings, round: int = 1) -> list[Trained]:
    work = [replace(w, start=bench.start_of(method, i)) for i, w in enumerate(bench.work(settings))]
    return bench.train(work, settings, method=method, round=round)


def test_the_card_keeps_values_and_refuses_tensors_of_both_devices() -> None:
    with card() as waits:
        x = torch.arange(4.0).to("cuda", non_blocking=True)
        assert isinstance(x, OnCard)
        assert x.device == torch.zeros(2, device="cuda").device == CARD
        assert waits.seen == []
        assert (x * 2).sum().item() == 12
        assert x.cpu().tolist() == [0, 1, 2, 3]
        assert len(waits.seen) == 2
        with pytest.raises(MixedDevices):
            x + torch.ones(4)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("bert", "rolora", {}),
        ("bert", "rolora", {"scaled": True}),
        ("roberta", "la_lora", {}),
        ("distilbert", "fed_sb", {}),
        ("llama", "rolora", {}),
        ("gpt2", "fedit", {}),
    ],
)
def test_a_round_waits_for_the_card_as_often_whatever_its_steps_and_ends_as_on_a_cpu(
    name: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    lora: dict[str, Any] = {"target_modules": ("q_lin", "v_lin")} if name == "distilbert" else {}
    bench = make(name, tmp_path / "model", dropout=0.1, **lora)
    made = get_method(method, **options)
    longer = replace(SETTINGS, steps=5)
    rounds = (1, 2)
    expected = [train(bench, made, SETTINGS, round) for round in rounds]
    with card() as waits:
        bench.base.model.to("cuda")
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
def test_clients_that_leave_early_and_an_evaluation_stay_on_one_device(
    name: str, tmp_path: Path
) -> None:
    bench = make(name, tmp_path / "model", torch.bfloat16)
    settings = replace(SETTINGS, steps=None, epochs=2, kept=frozenset({"A", "B"}))
    method = get_method("rolora")
    expected = train(bench, method, settings)
    scores = evaluate(bench.base, bench.task, bench.examples, expected[0].adapter)
    with card():
        bench.base.model.to("cuda")
        found = train(bench, method, settings)
        there = evaluate(bench.base, bench.task, bench.examples, expected[0].adapter)
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.02)
    assert there["loss"] == pytest.approx(scores["loss"], rel=0.02)


def test_a_run_on_a_card_starts_trains_evaluates_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 1 << 31))
    config = load_config(make_site(tmp_path), ["model.dtype=bf16", "train.lr=1e-2"])
    base = Experiment(config).load_base()

    def build(config: RunConfig, clients: Path) -> Experiment:
        return Experiment(config, clients, base=base)

    with card():
        base.model.to("cuda")
        assert base.device == CARD
        run = runs.start(config, tmp_path / "run", build)
        before, *_, last = [result.metrics["loss"] for result in run.rounds() if result.metrics]
    assert last < before
