"""``rolora init --from``: what a YAML file of TRL's says is taken over, or said not to be."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
from proposals import write_template

from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError

SFT = """\
# trl sft --config sft.yaml
model_name_or_path: Qwen/Qwen2.5-0.5B
model_revision: main
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_ratio: 0.1
weight_decay: 0.01
max_grad_norm: 0.5
max_length: 1024
gradient_checkpointing: true
bf16: true
seed: 7
optim: adamw_torch_fused
use_peft: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
packing: true
eval_strategy: steps
output_dir: out
nonsense: 3
"""
DPO = """\
learning_rate: 5e-7
beta: 0.05
loss_type: [ipo]
max_steps: 30
per_device_train_batch_size: 2
warmup_steps: 4
load_in_4bit: true
"""


def made(folder: Path, yaml: str, rows: list[dict[str, object]]) -> tuple[RunConfig, list[str]]:
    (folder / "trl.yaml").write_text(yaml)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = folder / "made.toml"
    notes, _ = write_template(str(folder / "rows.jsonl"), out, trainer=folder / "trl.yaml")
    return load_config(out), notes


def chats(count: int = 100) -> list[dict[str, object]]:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    return [{"messages": talk}] * count


def pairs(count: int = 100) -> list[dict[str, object]]:
    return [{"prompt": f"a {n}", "chosen": f"b {n}", "rejected": f"c {n}"} for n in range(count)]


def test_what_sft_says_is_taken_over(tmp_path: Path) -> None:
    config, _ = made(tmp_path, SFT, chats())
    assert config.model.path == "hub:Qwen/Qwen2.5-0.5B@main"
    assert (config.model.dtype, config.seed) == ("bf16", 7)
    lora, train = config.lora, config.train
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 16, 0.05)
    assert lora.target_modules == ["q_proj", "v_proj"]
    assert (train.lr, train.batch_size, train.schedule) == (2e-4, 16, "cosine")
    assert (train.weight_decay, train.max_grad_norm, train.recompute) == (0.01, 0.5, True)
    assert (train.optimizer, config.data.max_length) == ("adamw", 1024)


def test_clients_see_as_many_rows_in_all_as_trl_would(tmp_path: Path) -> None:
    config, _ = made(tmp_path, SFT, chats())
    train, clients = config.train, config.partition.clients
    each_round = clients * (train.local_steps or 0) * train.batch_size
    assert (train.rounds - 1) * each_round < 3 * 100 <= train.rounds * each_round


def test_what_dpo_says_is_taken_over(tmp_path: Path) -> None:
    """5e-7 is text to YAML, and a number to TRL."""
    config, notes = made(tmp_path, DPO, pairs())
    assert (config.train.lr, config.preference.beta, config.preference.loss) == (5e-7, 0.05, "ipo")
    assert config.model.dtype == "nf4"
    steps = config.train.local_steps or 0
    cohort = config.partition.clients
    assert (config.train.rounds - 1) * cohort * steps < 30 <= config.train.rounds * cohort * steps
    assert config.train.warmup_rounds == -(-4 // steps)
    assert not [note for note in notes if "trl.yaml" in note]


def test_what_is_not_taken_over_is_said_with_its_reason_here_and_in_the_file(
    tmp_path: Path,
) -> None:
    _, notes = made(tmp_path, SFT, chats())
    said = [note for note in notes if note.startswith("trl.yaml: ")]
    assert said == [
        "trl.yaml: dataset_name: trl-lib/Capybara is not used: the rows are those given to init",
        "trl.yaml: packing: True is not used: rolora neither pads nor joins rows",
        "trl.yaml: eval_strategy: steps is not used: eval.every counts rounds",
        "trl.yaml: output_dir: out is not used: name the run's folder with rolora run --out",
        "trl.yaml: nonsense: 3 is not used: rolora has no such setting",
    ]
    text = (tmp_path / "made.toml").read_text()
    assert all(f"# {note}\n" in text for note in said)


def test_settings_of_another_task_are_not_taken(tmp_path: Path) -> None:
    _, notes = made(tmp_path, "beta: 0.1", chats())
    assert "beta is not used: the task is causal_lm, not preference" in notes


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b", "has no settings of TRL"),
        ("", "has no settings of TRL"),
        ("learning_rate: fast", "learning_rate is 'fast', not a number"),
        ("seed: true", "seed is True, not a number"),
        ("lora_r: -1", "lora.rank"),
        (f"learning_rate: 1{'0' * 400}", "not a number"),
        ("learning_rate: .nan", "learning_rate is nan, not a number"),
        ("!!python/object/apply:os.system [exit]", "is not valid YAML"),
    ],
)
def test_a_file_that_is_none_of_trl_s_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, yaml: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, yaml, chats())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made.toml").exists()


def test_a_loss_that_rolora_lacks_is_said_with_those_it_has(tmp_path: Path) -> None:
    config, notes = made(tmp_path, "loss_type: hinge", pairs())
    assert config.preference.loss == "dpo"
    assert (
        "trl.yaml: loss_type: hinge is not used: preference.loss is one of dpo, ipo, kto" in notes
    )


@pytest.mark.parametrize(
    "line",
    [
        "run_name: 2024-01-01",
        "lora_target_modules: {a: b}",
        "lora_target_modules: [[a]]",
        "gradient_checkpointing: .nan",
        "model_revision: {a: b}",
    ],
)
def test_a_value_that_is_no_text_number_or_list_of_texts_is_not_taken(
    tmp_path: Path, line: str
) -> None:
    _, notes = made(tmp_path, line, chats())
    (note,) = [note for note in notes if line.partition(":")[0] + ": " in note]
    assert note.endswith("is not used: rolora reads texts, numbers and lists of texts")


def test_a_small_file_that_stands_for_more_than_memory_holds_is_not_written_out(
    tmp_path: Path,
) -> None:
    names = "abcdefghijkl"
    lines = [f"{to}: &{to} [{', '.join([f'*{of}'] * 9)}]" for of, to in itertools.pairwise(names)]
    _, notes = made(tmp_path, "\n".join(["a: &a [lol]", *lines]), chats())
    assert len([note for note in notes if "is not used" in note]) == len(names)


def test_a_quantized_base_stays_so_whatever_it_computes_in(tmp_path: Path) -> None:
    lines = ["bf16: true", "load_in_4bit: true"]
    for order in (lines, lines[::-1]):
        (tmp_path / "made.toml").unlink(missing_ok=True)
        config, _ = made(tmp_path, "\n".join(order), chats())
        assert config.model.dtype == "nf4"


@pytest.mark.parametrize(
    ("line", "both"), [("lora_r: 32", (32, 32)), ("lora_alpha: 8", (16, 8)), ("seed: 1", (4, 8))]
)
def test_rank_and_alpha_come_from_trl_together(
    tmp_path: Path, line: str, both: tuple[int, int]
) -> None:
    config, _ = made(tmp_path, line, chats())
    assert (config.lora.rank, config.lora.alpha) == both


def test_accumulation_without_the_batch_size_that_it_multiplies_is_not_taken(
    tmp_path: Path,
) -> None:
    _, notes = made(tmp_path, "gradient_accumulation_steps: 4", chats())
    assert any("gradient_accumulation_steps: 4 is not used" in note for note in notes)


def test_the_rows_of_one_file_are_not_taken_for_its_test_split(tmp_path: Path) -> None:
    config, notes = made(tmp_path, "dataset_test_split: test", chats())
    assert config.data.test == 0.2
    assert any(note.startswith("dataset_test_split: test is not used") for note in notes)


def test_a_model_given_beside_the_file_goes_first(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(SFT)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *[[f"a {n}", n % 2] for n in range(40)]])
    source, out = str(tmp_path / "a.csv"), tmp_path / "made.toml"
    write_template(source, out, "hub:owner/name", trainer=tmp_path / "trl.yaml")
    assert load_config(out).model.path == "hub:owner/name"
