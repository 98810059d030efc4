"""Claims about every method on the real questions with the real encoder (experiments/stand-ins)."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
from test_cli import rolora

from rolora.config.load import load_config
from rolora.demo.fetch import fetch
from rolora.methods import method_names
from rolora.results.runs import load_run
from rolora.run import runs

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trec() -> Path:
    """The experiment, with its model and rows fetched."""
    for name in ("minilm", "trec"):
        fetch(name, HERE / "data")
    return HERE / "experiments" / "stand-ins" / "trec-minilm.toml"


@pytest.mark.parametrize("name", method_names())
def test_a_method_runs_the_questions_and_resumes_with_the_same_bits(
    name: str, trec: Path, tmp_path: Path
) -> None:
    few = ["train.rounds=4", "eval.every=2", f"method.name={name}"]
    config = load_config(trec, few)
    whole = runs.start(config, tmp_path / "whole")
    results = list(whole.rounds())
    assert results[-1].metrics["accuracy"] > 1 / 6

    cut = runs.start(config, tmp_path / "cut")
    assert len(list(islice(cut.rounds(), 3))) == 3  # before training, then two rounds
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    list(runs.resume(tmp_path / "again").rounds())
    file = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_demo_of_preferences_raises_the_margin_of_rolora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("smollm2", "trec-preferences"):
        (tmp_path / name).symlink_to(fetch(name, HERE / "data"))
    words = ("demo", "--task", "preference", "--folder", tmp_path, "--json")
    code, out, err = rolora(monkeypatch, capsys, *words)
    assert code == 0
    assert err.count("running 400 rows through the model before training, once") <= 1
    found = json.loads(out)
    assert Path(found["report"]).is_file()
    for folder in (tmp_path / "runs" / "preferences-1").glob("rolora-seed*"):
        rounds = [one["metrics"] for one in load_run(folder).rounds if one["metrics"]]
        first, last = rounds[0], rounds[-1]
        assert last["margin"] > first["margin"] + 0.2, folder.name
        assert last["loss"] < first["loss"] - 0.05, folder.name
        assert last["accuracy"] > first["accuracy"] + 0.1, folder.name
