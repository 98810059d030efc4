"""Answers before and after training: what the base and the adapter write, kept with the run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from golden import PAIRS, WRITER, make_place

import rolora
from rolora.config.schema import RunConfig
from rolora.run.chat import AFTER, BEFORE, speakers
from rolora.run.samples import TOKENS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def configured(place: Path, *overrides: str) -> RunConfig:
    return rolora.make_config(WRITER, ["train.rounds=2", "train.lr=0.1", *overrides], root=place)


def finished(place: Path, out: Path, *overrides: str) -> Path:
    list(rolora.start(configured(place, *overrides), out).rounds())
    return out


def read(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "samples.json").read_text())
    return found


def test_the_answers_are_those_that_the_base_and_the_adapter_give_in_a_chat(
    place: Path, tmp_path: Path
) -> None:
    run = finished(place, tmp_path / "run", "eval.samples=4")
    both, found = speakers(run, None), read(run)
    assert len({one["prompt"] for one in found}) == len(found) == 4
    for one in found:
        assert one["before"] == both.answer(BEFORE, [one["prompt"]], TOKENS)
        assert one["after"] == both.answer(AFTER, [one["prompt"]], TOKENS)
        assert (one["prompt"], one["expected"]) in PAIRS
    assert any(one["before"] != one["after"] for one in found)


def test_a_stopped_and_resumed_run_keeps_the_same_answers_and_other_seeds_the_same_prompts(
    place: Path, tmp_path: Path
) -> None:
    whole = finished(place, tmp_path / "whole")
    list(itertools.islice(rolora.start(configured(place), tmp_path / "stopped").rounds(), 2))
    assert not (tmp_path / "stopped" / "samples.json").exists()
    list(rolora.resume(tmp_path / "stopped").rounds())
    kept = (tmp_path / "stopped" / "samples.json").read_bytes()
    assert kept == (whole / "samples.json").read_bytes()
    other = finished(place, tmp_path / "other", "seed=7")
    assert [one["prompt"] for one in read(other)] == [one["prompt"] for one in read(whole)]


@pytest.mark.parametrize("override", ["eval.samples=0", "method.name=fedsa_lora"])
def test_no_text_of_a_row_is_kept_if_none_is_wanted_or_the_adapter_is_not_whole(
    place: Path, tmp_path: Path, override: str
) -> None:
    assert not (finished(place, tmp_path / "run", override) / "samples.json").exists()


def test_a_model_that_cannot_answer_costs_the_page_and_not_the_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> list[str]:
        raise RuntimeError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr("rolora.run.samples.generate", fails)
        with pytest.raises(RuntimeError, match="no answer"):
            finished(place, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    list(rolora.resume(tmp_path / "run").rounds())
    assert read(tmp_path / "run")
