"""Claims about the model card in an adapter folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from huggingface_hub import ModelCard
from synthetic_runs import LABELS, write_run
from tiny_clients import classifier

import rolora
from rolora.report.card import Source, card
from rolora.results.runs import load_run

SOURCE = Source("org/model", "0123abcd", "mit", ["encoder.0.query"], LABELS, False, [])


def header(text: str) -> dict[str, Any]:
    """The YAML of a card, as a hub reads it."""
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    return dict(data.to_dict())


def test_a_card_says_what_was_trained_on_what_and_how_it_scored(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", seed=3, name="questions"))
    text = card(run, 40, SOURCE)
    assert header(text) == {
        "base_model": "org/model",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "federated-learning", "rolora"],
    }
    cells = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if "|" in line]
    rows = dict(pair for pair in cells if len(pair) == 2)
    sizes = [client["num_examples"] for client in run.partition["clients"]]
    assert rows["training rows"].startswith(f"{sum(sizes):,}, from {min(sizes)} to {max(sizes)} ")
    assert rows["task"] == f"classification: {', '.join(LABELS)}"
    assert rows["accuracy"] == f"{run.rounds[-1]['metrics']['accuracy']:.3f}"
    assert rows["seed"] == "3"
    error = max(line["aggregation_error"] for line in run.rounds if line["round"])
    assert rows["largest aggregation error"] == f"{error:.1e}"
    assert "AutoPeftModelForSequenceClassification" in text


def test_a_card_of_an_earlier_round_has_that_round_s_metrics(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    (metrics,) = (line["metrics"] for line in run.rounds if line["round"] == 25)
    text = card(run, 25, SOURCE)
    assert "this adapter is from round 25, the best on validation rows" in text
    assert f"| accuracy | {metrics['accuracy']:.3f} |" in text
    assert "Round 24 was not evaluated" in card(run, 24, SOURCE)


def test_a_card_names_no_client_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    base = tmp_path / "secret-place" / "base"
    base.mkdir(parents=True)
    text = card(load_run(write_run(tmp_path / "run")), 40, replace(SOURCE, base=str(base)))
    assert "base_model" not in header(text)
    assert "| base model | minilm, weights" in text
    assert "secret" not in text
    assert "client-0" not in text


def test_a_card_of_clients_with_ranks_of_their_own_has_the_largest_and_no_name(
    tmp_path: Path,
) -> None:
    run = load_run(write_run(tmp_path / "run"))
    run.config["lora"] = {"rank": {"ann-*": 2, "*": 8}, "alpha": 8.0}
    assert "| adapter | rank 8, alpha 8.0, on query |" in card(run, 40, SOURCE)


def test_no_name_of_the_user_s_breaks_a_card(tmp_path: Path) -> None:
    unkind = 'a: "b" | c\n# d <script> - [x](y)'
    run = load_run(write_run(tmp_path / "run", name=unkind))
    source = replace(SOURCE, base='x/"y', licence='"a: b"', labels=[unkind, "--- "])
    text = card(run, 40, source)
    assert header(text)["license"] == '"a: b"'
    assert len([line for line in text.splitlines() if line.startswith("# ")]) == 1
    assert "<script>" not in text
    assert "\n| task | classification: a: " in text


def test_a_card_of_a_gguf_base_says_how_to_load_that(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "config.toml"
    file.write_text(file.read_text().replace("models/minilm", "models/base.Q4_1.gguf"))
    text = card(load_run(folder), 40, replace(SOURCE, base=str(tmp_path), causal=True))
    assert "| base model | base.Q4\\_1.gguf, weights" in text
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert '    "BASE_FOLDER", gguf_file="base.Q4_1.gguf"\n' in text


def test_a_card_says_what_stays_with_the_clients(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", "fedsa_lora"))
    text = card(run, 40, replace(SOURCE, kept=["B", "head"]))
    assert "each client keeps its own lora_B and head, which is not in this folder" in text
    assert "of one run: means over the clients, each with its own lora_B and head." in text


def test_a_card_says_which_rows_its_metrics_are_of(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    assert "On test rows that no client had, after round 40 of one run. " in card(run, 40, SOURCE)
    run.config["eval"] = {"rows": "validation"}
    assert "On validation rows that no client had" in card(run, 40, SOURCE)


def test_a_card_says_which_metrics_are_of_the_second_test_rows(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    assert "second" not in card(run, 40, SOURCE)
    run.rounds[-1]["metrics"]["accuracy/else_where"] = 0.5
    text = card(run, 40, SOURCE)
    assert "gives other numbers. Metrics that end in /else\\_where are of the second" in text
    assert "\n\n| metric | value |\n" in text


def test_the_licence_of_a_base_is_what_the_card_in_its_folder_says(tmp_path: Path) -> None:
    tiny.tiny_bert(tmp_path / "base")
    base = classifier(tmp_path / "base", torch.float32).base
    assert base.licence is None
    cards = {"license: apache-2.0": "apache-2.0", "license: [a, b]": None, "license: [": None}
    for line, licence in cards.items():
        (tmp_path / "base" / "README.md").write_text(f"---\n{line}\n---\n# A base\n")
        assert base.licence == licence, line


def test_a_run_leaves_a_card_in_its_adapter_folder(site: Path, tmp_path: Path) -> None:
    run = rolora.start(rolora.load_config(site, ["train.rounds=2"]), tmp_path / "run")
    (*_, last) = run.rounds()
    text = (run.folder.adapter / "README.md").read_text(encoding="utf-8")
    assert header(text)["library_name"] == "peft"
    assert f"| accuracy | {last.metrics['accuracy']:.3f} |" in text
    assert f"weights `{run.experiment.base.digest}`" in text
