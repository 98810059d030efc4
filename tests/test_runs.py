"""Whole runs on a tiny model: what a run leaves, resuming bit for bit, comparing on equal terms."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_cli import rolora
from tiny_site import make_site, write_rows

from rolora.comparison.grid import plan
from rolora.config.load import config_hash, load_config
from rolora.errors import ConfigError
from rolora.model.peft import read_adapter
from rolora.results.runs import by_method, load_run
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter


def finish(run: runs.Run) -> Path:
    list(run.rounds())
    return run.folder.path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (path / "rounds.jsonl").read_text().splitlines()]


def adapter_hash(path: Path) -> str:
    return hashlib.sha256((path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(runs.start(load_config(site), tmp_path_factory.mktemp("runs") / "whole"))


def test_a_run_leaves_the_folder_that_the_documentation_promises(whole: Path) -> None:
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.toml",
        "partition.json",
        "axes.json",
        "rounds.jsonl",
        "checkpoints",
        "adapter",
        "report.html",
    }
    assert [entry["round"] for entry in lines(whole)] == [0, 1, 2, 3, 4]
    assert [entry["factors"] for entry in lines(whole)[1:3]] == [["B", "head"], ["A", "head"]]


def test_the_recall_of_all_labels_by_their_rows_is_the_accuracy_of_each_evaluation(
    whole: Path,
) -> None:
    rows = json.loads((whole / "axes.json").read_text())["labels"]
    assert rows == {"bad": 4, "cat": 4, "good": 4}
    evaluated = [entry for entry in lines(whole) if entry["metrics"]]
    assert [entry["round"] for entry in evaluated] == [0, 2, 3, 4]
    for entry in evaluated:
        found = sum(r * n for r, n in zip(entry["recall"], rows.values(), strict=True)) / 12
        assert found == pytest.approx(entry["metrics"]["accuracy"], abs=1e-4)
    assert not any("recall" in entry for entry in lines(whole) if not entry["metrics"])


def test_every_round_of_rolora_is_exact(whole: Path) -> None:
    for entry in lines(whole)[1:]:
        assert isinstance(entry["aggregation_error"], float)
        assert entry["aggregation_error"] <= 1e-6


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(
    site: Path, whole: Path, tmp_path: Path, stop_after: int
) -> None:
    run = runs.start(load_config(site), tmp_path / "stopped")
    for result in itertools.islice(run.rounds(), stop_after + 1):
        last = result.round
    assert last == stop_after
    path = finish(runs.resume(tmp_path / "stopped"))
    assert adapter_hash(path) == adapter_hash(whole)
    untimed = [{k: v for k, v in entry.items() if k != "seconds"} for entry in lines(path)]
    assert untimed == [{k: v for k, v in e.items() if k != "seconds"} for e in lines(whole)]


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    site: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "rolora", "run", str(site), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/round-000001*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert adapter_hash(finish(runs.resume(out))) == adapter_hash(whole)


def test_a_personal_method_resumes_to_the_same_bytes(site: Path, tmp_path: Path) -> None:
    config = load_config(site, ["method.name=local"])
    finish(runs.start(config, tmp_path / "whole"))
    list(itertools.islice(runs.start(config, tmp_path / "stopped").rounds(), 3))
    finish(runs.resume(tmp_path / "stopped"))
    one, other = (lines(tmp_path / name)[-1] for name in ("whole", "stopped"))
    assert one["client_metrics"] == other["client_metrics"]
    assert one["metrics"] == other["metrics"]
    for file in (tmp_path / "whole" / "clients").glob("*/*.safetensors"):
        twin = tmp_path / "stopped" / file.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_with_int8_uploads_resumes_to_the_same_bytes(
    site: Path, whole: Path, tmp_path: Path, stop_after: int
) -> None:
    config = load_config(site, ["wire.up=int8"])
    finish(runs.start(config, tmp_path / "whole"))
    list(itertools.islice(runs.start(config, tmp_path / "stopped").rounds(), stop_after + 1))
    finish(runs.resume(tmp_path / "stopped"))
    assert adapter_hash(tmp_path / "stopped") == adapter_hash(tmp_path / "whole")
    assert adapter_hash(tmp_path / "whole") != adapter_hash(whole)
    files = sorted((tmp_path / "whole" / "clients").glob("*/residual-*.safetensors"))
    assert files
    for file in files:
        twin = tmp_path / "stopped" / file.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == file.read_bytes()
    for encoded, plain in zip(lines(tmp_path / "whole")[1:], lines(whole)[1:], strict=True):
        assert 3 < float(str(plain["bytes_up"])) / float(str(encoded["bytes_up"])) < 4


def test_a_resumed_run_says_that_it_keeps_its_threads(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    next(runs.start(load_config(site), path).rounds())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        notes = runs.resume(path).notes
    finally:
        torch.set_num_threads(threads)
    began = "1 thread" if threads == 1 else f"{threads} threads"
    assert f"it continues on {began}, as it began: OMP_NUM_THREADS is not used" in notes


def test_a_resumed_run_can_be_given_more_rounds(site: Path, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "longer"))
    finish(runs.resume(path, rounds=6))
    assert [entry["round"] for entry in lines(path)] == [0, 1, 2, 3, 4, 5, 6]
    straight = finish(runs.start(load_config(site, ["train.rounds=6"]), tmp_path / "straight"))
    assert adapter_hash(path) == adapter_hash(straight)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", ["run", "compare"])
def test_a_run_that_is_left_half_way_lets_python_end_in_silence(
    site: Path, tmp_path: Path, what: str, workers: int
) -> None:
    begin = {
        "run": "rolora.start(config, sys.argv[2])",
        "compare": "next(runs := rolora.compare(config, ['rolora', 'fedit'], [0], sys.argv[2]))",
    }
    program = f"""
import sys
import rolora
config = rolora.load_config(sys.argv[1], ["train.workers={workers}", "train.bank=1"])
rounds = {begin[what]}.rounds()
next(rounds), next(rounds)
"""
    command = [sys.executable, "-c", program, str(site), str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not list(tmp_path.rglob(".part-*"))


def with_other_weights(site: Path) -> None:
    file = site / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.0.attention.self.key.weight"] *= 1.5
    save_file(tensors, file, {"format": "pt"})


def with_other_settings(site: Path) -> None:
    file = site / "run" / "config.toml"
    file.write_text(file.read_text().replace("lr = 0.005", "lr = 0.05"))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the data", lambda site: write_rows(site / "train.csv", 61)),
        ("the data", lambda site: write_rows(site / "test.csv", 13)),
        ("the base model", with_other_weights),
        ("the configuration", with_other_settings),
    ],
)
def test_a_run_is_not_resumed_on_other_data_another_model_or_other_settings(
    tmp_path: Path, what: str, change: Callable[[Path], object]
) -> None:
    config = make_site(tmp_path)
    list(itertools.islice(runs.start(load_config(config), tmp_path / "run").rounds(), 2))
    runs.resume(tmp_path / "run")
    change(tmp_path)
    with pytest.raises(ConfigError, match=f"{what} of .* changed since the run started"):
        runs.resume(tmp_path / "run")


def test_the_configuration_of_a_run_folder_starts_the_same_run_anew(
    whole: Path, tmp_path: Path
) -> None:
    again = finish(runs.start(load_config(whole / "config.toml"), tmp_path / "again"))
    assert adapter_hash(again) == adapter_hash(whole)


@pytest.mark.parametrize(
    ("file", "damaged", "message"),
    [
        ("config.toml", "seed = ", "config.toml is not valid TOML"),
        ("config.toml", "seed = 0", "config.toml is damaged: provenance.bank is missing"),
        ("partition.json", None, "is not a run folder: partition.json is missing"),
    ],
)
def test_a_damaged_run_folder_is_refused_before_any_training(
    whole: Path, tmp_path: Path, file: str, damaged: str | None, message: str
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    (path / file).unlink()
    if damaged is not None:
        (path / file).write_text(damaged)
    with pytest.raises(ConfigError, match=re.escape(message)):
        runs.resume(path)


def test_a_run_that_began_with_a_key_without_effect_goes_on_and_its_adapter_is_evaluated(
    site: Path, tmp_path: Path
) -> None:
    config, out = load_config(site, ["train.rounds=1"]), tmp_path / "run"
    idle = config.aggregate.model_copy(update={"server_lr": 0.5})
    list(runs.start(config.model_copy(update={"aggregate": idle}), out).rounds())
    assert [result.round for result in runs.resume(out, 2).rounds()] == [2]
    assert "accuracy" in evaluate_adapter(out, str(site.parent / "test.csv"))


@pytest.mark.parametrize("damaged", ["{", "[]", "{}"])
def test_an_adapter_whose_notes_are_damaged_is_refused(
    whole: Path, tmp_path: Path, damaged: str
) -> None:
    folder = Path(shutil.copytree(whole / "adapter", tmp_path / "adapter"))
    (folder / "rolora.json").write_text(damaged)
    with pytest.raises(ConfigError, match=r"rolora\.json is damaged"):
        evaluate_adapter(folder, "rows.csv")


def test_peft_loads_the_adapter_and_gives_the_same_logits(site: Path, whole: Path) -> None:
    run = runs.start(load_config(site), whole.parent / "logits")
    base, texts = run.experiment.base, ["a good film and a dog", "the cat", "a bad plot"]
    adapter = read_adapter(whole / "adapter", base.specs)
    inputs = base.tokenizer(texts, padding=True, return_tensors="pt")
    with base.holding(adapter), torch.no_grad():
        ours = base.model(**inputs).logits
    config = transformers.AutoConfig.from_pretrained(whole / "adapter" / "model_config.json")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        site.parent / "model", config=config
    )
    theirs = peft.PeftModel.from_pretrained(plain, whole / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits, ours, rtol=0, atol=1e-5)
    assert config.id2label == {0: "bad", 1: "cat", 2: "good"}


def test_an_adapter_is_evaluated_by_itself_as_in_its_run(site: Path, whole: Path) -> None:
    metrics = evaluate_adapter(whole, str(site.parent / "test.csv"))
    assert metrics == lines(whole)[-1]["metrics"]
    assert evaluate_adapter(whole / "adapter", str(site.parent / "test.csv")) == metrics


def test_eval_prints_the_recall_of_each_label_in_its_json(
    site: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = site.parent / "test.csv"
    code, out, _ = rolora(monkeypatch, capsys, "eval", whole, "--data", data, "--json")
    recall = json.loads(out).pop("recall")
    assert code == 0
    assert list(recall) == ["bad", "cat", "good"]
    assert [round(share, 4) for share in recall.values()] == lines(whole)[-1]["recall"]


def test_rows_with_some_of_a_run_s_labels_are_evaluated_by_the_run_s_own_names(
    site: Path, tmp_path: Path
) -> None:
    """Training rows have the labels 1, 2 and "other"; a file with only 1 and 2 has no less."""
    numbers = "text,label\n" + "a good film,2\na bad film,1\n" * 10
    (tmp_path / "numbers.csv").write_text(numbers)
    (tmp_path / "train.csv").write_text(numbers + "the cat sat,other\n" * 10)
    train = [f"data.train={tmp_path / 'train.csv'}", f"data.test={tmp_path / 'numbers.csv'}"]
    run = runs.start(load_config(site, [*train, "train.rounds=1"]), tmp_path / "run")
    *_, last = run.rounds()
    assert run.experiment.labels == ("1", "2", "other")
    names = json.loads((tmp_path / "run" / "adapter" / "model_config.json").read_text())["id2label"]
    assert names == {"0": "1", "1": "2", "2": "other"}
    found = evaluate_adapter(tmp_path / "run", str(tmp_path / "numbers.csv"))
    assert found == last.metrics


def test_a_warm_start_begins_where_the_other_run_ended(
    site: Path, whole: Path, tmp_path: Path
) -> None:
    config = load_config(site, [f"lora.init_from={whole / 'adapter'}"])
    first = next(runs.start(config, tmp_path / "warm").rounds())
    assert dict(first.metrics) == lines(whole)[-1]["metrics"]


def test_the_best_validated_round_is_exported_and_patience_ends_the_run(
    site: Path, tmp_path: Path
) -> None:
    # a rate of next to nothing: no validation is better than the first one
    changes = ["data.validation=0.2", "eval.patience=2", "eval.every=1", "train.lr=1e-12"]
    run = runs.start(load_config(site, [*changes, "train.rounds=30"]), tmp_path / "early")
    results = list(run.rounds())
    best = results[-1].state.best
    assert best is not None
    assert (best.round, results[-1].round) == (1, 3)
    assert load_run(run.folder.path).finished
    exported = read_adapter(run.folder.adapter, run.experiment.base.specs)
    assert all(torch.equal(exported[name], best.adapter[name]) for name in exported)


def test_a_run_that_validates_one_phase_alone_says_so_and_does_not_stop_by_it(
    site: Path, tmp_path: Path
) -> None:
    changes = ["data.validation=0.2", "eval.patience=1", "eval.every=2", "train.lr=1e-12"]
    run = runs.start(load_config(site, [*changes, "train.rounds=6"]), tmp_path / "run")
    assert any("meets only rounds that train A:" in note for note in run.notes)
    assert [result.round for result in run.rounds()][-1] == 6
    run.folder.report.unlink()  # as it was on the way
    record = load_run(run.folder.path)
    parts = [replace(record, rounds=record.rounds[: done + 1]) for done in range(7)]
    assert [part.finished for part in parts] == [False] * 6 + [True]
    odd = runs.start(load_config(site, ["eval.every=3", "train.rounds=6"]), tmp_path / "odd")
    assert not any("eval.every" in note for note in odd.notes)


@pytest.mark.parametrize("method", ["local", "fedsa_lora", "fed_alora"])
def test_personal_adapters_are_validated_and_not_the_server_s_part(
    method: str, site: Path, tmp_path: Path
) -> None:
    changes = ["data.validation=0.2", "eval.every=1", "train.rounds=2", f"method.name={method}"]
    run = runs.start(load_config(site, changes), tmp_path / "run")
    results = list(run.rounds())
    first, *later = [result.validation for result in results]
    assert len({found["loss"] for found in (first, *later)}) == 3
    server = run.experiment.federation.evaluate(run.experiment.start.server.adapter)
    assert server.validation == first
    last = run.experiment.federation.evaluate(results[-1].state.server.adapter)
    # fed_alora's lora_B beside the first lora_A is a product that no client has
    assert (last.validation == first) == (method != "fed_alora")
    assert last.validation != later[-1]
    assert any("in clients/ of the run's folder" in note for note in run.notes)
    with pytest.raises(ConfigError, match=f"holds only the server's part of {method}"):
        evaluate_adapter(tmp_path / "run", str(site.parent / "test.csv"))


def test_clients_with_their_own_files_and_held_out_rows(site: Path, tmp_path: Path) -> None:
    for name, count in (("site-a", 20), ("site-b", 31)):
        write_rows(tmp_path / f"{name}.csv", count)
    changes = [
        f"data.train={tmp_path}/site-*.csv",
        "partition.scheme=files",
        "data.client_test=0.3",
        "train.participation=1.0",
    ]
    run = runs.start(load_config(site, changes), tmp_path / "run")
    last = list(run.rounds())[-1]
    assert last.cohort == ("site-a", "site-b")
    assert {c: values["num_examples"] for c, values in last.clients.items()} == {
        "site-a": 14,
        "site-b": 22,
    }
    assert last.client_metrics.keys() == {"site-a", "site-b"}


def test_a_run_with_a_table_of_ranks_resumes_and_is_reported(site: Path, tmp_path: Path) -> None:
    table = 'lora.rank={"client-1" = 1, "*" = 3}'
    config = load_config(site, ["method.name=flora", table, "train.rounds=2"])
    list(itertools.islice(runs.start(config, tmp_path / "run").rounds(), 2))
    *_, last = runs.resume(tmp_path / "run").rounds()
    assert last.round == 2
    assert "LoRA of rank 1 to 3" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_has_no_axes_yet_is_resumed_to_the_same_adapter_and_page(
    site: Path, whole: Path, tmp_path: Path
) -> None:
    list(itertools.islice(runs.start(load_config(site), tmp_path / "old").rounds(), 2))
    folder = tmp_path / "old"
    (folder / "axes.json").unlink()
    (folder / "config.toml").write_text(
        (folder / "config.toml").read_text().replace("samples = 3\n", "")
    )
    first, second = lines(folder)
    del first["recall"], first["layers"]
    (folder / "rounds.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    path = finish(runs.resume(folder))
    assert adapter_hash(path) == adapter_hash(whole)
    assert (path / "axes.json").read_bytes() == (whole / "axes.json").read_bytes()
    assert "Recall of each label" in (path / "report.html").read_text()


def test_how_many_answers_a_page_shows_is_no_setting_that_tells_runs_apart(
    site: Path, tmp_path: Path
) -> None:
    few, none = (load_config(site, [f"eval.samples={n}"]) for n in (3, 0))
    assert config_hash(few) == config_hash(none)
    assert plan(few, {"rolora": ()}, [0]).record() == plan(none, {"rolora": ()}, [0]).record()
    each = [
        load_run(finish(runs.start(config, tmp_path / f"seed{seed}")))
        for seed, config in enumerate(
            (
                load_config(site, ["seed=0", "eval.samples=0", "train.rounds=1"]),
                load_config(site, ["seed=1", "train.workers=2", "train.rounds=1"]),
            )
        )
    ]
    assert list(by_method(each)) == ["rolora"]
