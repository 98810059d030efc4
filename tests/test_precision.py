"""Claims about bfloat16: taken where it is faster and agrees; adapters stay float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from tiny_clients import Bench, classifier
from tiny_site import make_site

from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.model.base import Base
from rolora.run import runs
from rolora.training import precision
from rolora.training.precision import lowered
from rolora.training.settings import LocalSettings

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return classifier(tiny.tiny_bert(tmp_path / "model"), torch.float32)


def choose(bench: Bench, speed: float) -> tuple[Base, str]:
    other = classifier(Path(str(bench.base.model.config._name_or_path)), torch.float32).base  # type: ignore[union-attr]
    return lowered(
        bench.base, bench.task, bench.examples, bench.start(), lambda: other, lambda: speed
    )


def test_bfloat16_is_taken_where_it_is_faster_and_its_loss_agrees(bench: Bench) -> None:
    base, said = choose(bench, 1.7)
    assert base.dtype == torch.bfloat16
    assert "bfloat16, 1.70 times as fast here: loss" in said


def test_float32_stays_where_bfloat16_gains_too_little(bench: Bench) -> None:
    base, said = choose(bench, 1.1)
    assert base.dtype == torch.float32
    assert said == "the base runs in float32: bfloat16 is 1.10 times as fast here"


def test_float32_comes_back_where_the_losses_differ(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "AGREEMENT", 0.0)
    base, said = choose(bench, 1.7)
    assert base.dtype == torch.float32
    assert "in bfloat16 the loss differs" in said


def test_adapters_stay_float32_on_a_bfloat16_base_and_learn_nearly_the_same(bench: Bench) -> None:
    settings = LocalSettings(steps=3, batch_size=8)
    work = bench.work(settings)
    before = bench.train(work, settings)
    assert choose(bench, 9.0)[0].dtype == torch.bfloat16
    after = bench.train(work, settings)
    for one, other in zip(before, after, strict=True):
        assert all(tensor.dtype == torch.float32 for tensor in other.adapter.values())
        assert other.loss == pytest.approx(one.loss, rel=0.02)


def test_a_run_in_bfloat16_resumes_in_bfloat16_to_the_same_adapter(tmp_path: Path) -> None:
    config = load_config(make_site(tmp_path), ["model.dtype=bf16"])
    whole = runs.start(config, tmp_path / "whole")
    assert whole.experiment.base.dtype == torch.bfloat16
    end = list(whole.rounds())[-1].state.server.adapter
    stopped = runs.start(config, tmp_path / "stopped").rounds()
    for _ in range(3):
        next(stopped)
    stopped.close()
    resumed = runs.resume(tmp_path / "stopped")
    assert resumed.experiment.base.dtype == torch.bfloat16
    again = list(resumed.rounds())[-1].state.server.adapter
    assert all(torch.equal(again[name], end[name]) for name in end)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_run_on_a_quantised_base_trains_or_says_what_it_needs(tmp_path: Path, dtype: str) -> None:
    config = load_config(make_site(tmp_path), [f"model.dtype={dtype}"])
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match=r"needs: pip install 'rolora\[quantised\]'"):
            runs.start(config, tmp_path / "run")
        return
    if dtype == "nf4":
        with pytest.raises(ConfigError, match=r"'nf4' needs device = 'cuda'; on a CPU use 'int8'"):
            runs.start(config, tmp_path / "run")
        return
    run = runs.start(config, tmp_path / "run")
    kinds = {type(m).__name__ for m in run.experiment.base.model.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    before, *_, last = [result.metrics["loss"] for result in run.rounds() if result.metrics]
    assert last < before
    again = runs.resume(tmp_path / "run", rounds=5)
    assert list(again.rounds())[-1].round == 5
