"""Claims about bfloat16: taken where it is faster and agrees; adapters stay float32."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny_clients import Bench, classifier
from tiny_site import make_site

from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.model.base import Base, load_base
from rolora.run import experiment, runs
from rolora.run.evaluation import evaluate_adapter
from rolora.training import precision
from rolora.training.local import NonFiniteLoss, train_group
from rolora.training.precision import lower
from rolora.training.settings import LocalSettings

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return classifier(tiny.tiny_bert(tmp_path / "model"), torch.float32)


def choose(bench: Bench, speed: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said, where a step in bfloat16 takes 1 second and one in float32 ``speed``."""

    def timed(step: Callable[[], float]) -> tuple[float, float]:
        return (1.0 if bench.base.dtype == torch.bfloat16 else speed), step()

    monkeypatch.setattr(precision, "timed", timed)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    return lower(bench.base, bench.task, bench.examples, bench.start(), 4, 3)


def test_bfloat16_is_taken_where_a_training_step_is_shorter_and_its_loss_agrees(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = choose(bench, 1.2, monkeypatch)
    assert bench.base.dtype == torch.bfloat16
    assert re.fullmatch(
        r"the base runs in bfloat16: a step in bfloat16 is 1.20 times as fast here, and its loss "
        r"is \d\.\d{4} \(in float32 \d\.\d{4}\)",
        said,
    )


@pytest.mark.parametrize("speed", [0.7, 1.0, 1.04])
def test_float32_stays_to_the_bit_where_steps_are_no_shorter(
    speed: float, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in bench.base.model.state_dict().items()}
    said = choose(bench, speed, monkeypatch)
    assert f"runs in float32: a step in bfloat16 is {speed:.2f} times as fast here" in said
    for name, tensor in bench.base.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_float32_comes_back_where_the_losses_differ(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "AGREEMENT", 0.0)
    said = choose(bench, 1.7, monkeypatch)
    assert bench.base.dtype == torch.float32
    assert said.startswith("the base runs in float32")
    assert said.endswith(", which is too different")


@pytest.mark.parametrize("error", [RuntimeError("mixed\ndtype"), NonFiniteLoss("not finite")])
def test_float32_comes_back_where_a_step_in_bfloat16_fails(
    error: Exception, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(base: Base, *given: Any, **more: Any) -> Any:
        if base.dtype == torch.bfloat16:
            raise error
        return train_group(base, *given, **more)

    monkeypatch.setattr(precision, "train_group", failing)
    said = choose(bench, 1.7, monkeypatch)
    assert bench.base.dtype == torch.float32
    assert said.startswith("the base runs in float32, since a step in bfloat16 fails: ")
    assert "\n" not in said


def test_what_is_timed_are_steps_of_a_bank_of_clients_forward_and_backward(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def timed(step: Callable[[], float]) -> tuple[float, float]:
        with torch.profiler.profile() as profile:
            loss = step()
        names = {event.key for event in profile.key_averages()}
        assert {"aten::cross_entropy_loss", "NllLossBackward0"} & names
        seen.append((bench.base.dtype, "AddLowRankBackward" in names))
        return 1.0, loss

    monkeypatch.setattr(precision, "timed", timed)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    lower(bench.base, bench.task, bench.examples, bench.start(), 4, 3)
    assert seen == [(torch.float32, True), (torch.bfloat16, True)]


@pytest.mark.parametrize("speed", [0.8, 1.5])
def test_a_run_whose_dtype_was_measured_loads_its_base_once_resumes_and_evaluates_in_it(
    speed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[torch.dtype] = []
    bases: list[Base] = []

    def timed(step: Callable[[], float]) -> tuple[float, float]:
        short = bases[-1].dtype == torch.bfloat16
        return (1.0 if short else speed), step()

    def load(*given: Any, **named: Any) -> Base:
        loads.append(named["dtype"])
        bases.append(load_base(*given, **named))
        return bases[-1]

    monkeypatch.setattr(experiment, "load_base", load)
    monkeypatch.setattr(precision, "timed", timed)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    monkeypatch.setattr(precision, "WIDE", 1)
    chosen = torch.bfloat16 if speed > 1 else torch.float32
    config = load_config(make_site(tmp_path), ["model.dtype=auto"])
    names = dict(enumerate(["bad", "cat", "good"]))  # so that the run starts from its head
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", id2label=names
    )
    model.save_pretrained(tmp_path / "model")
    whole = runs.start(config, tmp_path / "whole")
    assert loads == [torch.float32]
    assert whole.experiment.base.dtype == chosen
    assert any("a step in bfloat16 is" in note for note in whole.notes)
    end = list(whole.rounds())[-1].state.server.adapter
    stopped = runs.start(config, tmp_path / "stopped").rounds()
    for _ in range(3):
        next(stopped)
    stopped.close()
    monkeypatch.setattr(precision, "timed", None)
    resumed = runs.resume(tmp_path / "stopped")
    assert loads[-1] == resumed.experiment.base.dtype == chosen
    again = list(resumed.rounds())[-1].state.server.adapter
    assert all(torch.equal(again[name], end[name]) for name in end)
    scores = evaluate_adapter(tmp_path / "whole", str(tmp_path / "test.csv"))
    assert loads[-1] == chosen
    assert scores["loss"] > 0


def test_adapters_stay_float32_on_a_bfloat16_base_and_learn_nearly_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LocalSettings(steps=3, batch_size=8)
    work = bench.work(settings)
    before = bench.train(work, settings)
    choose(bench, 9.0, monkeypatch)
    assert bench.base.dtype == torch.bfloat16
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


def test_time_that_other_programs_take_is_not_counted_and_threads_stay_as_they_were() -> None:
    threads, seen = torch.get_num_threads(), list[int]()

    def step() -> float:
        seen.append(torch.get_num_threads())
        time.sleep(0.2)
        return 1.5

    seconds, loss = precision.timed(step)
    assert seconds < 0.1
    assert (loss, seen, torch.get_num_threads()) == (1.5, [1], threads)
