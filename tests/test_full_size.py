"""The paper's models in their true width, with random weights: the same code, the same numbers.

Nothing is downloaded. What a model of this size learns is another question; here it is that every
part holds what it promises when tensors are large.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from allocation import allocated
from tiny import SENTENCES, chat_tokenizer, word_tokenizer

from rolora.algorithm.adapter import AdapterState, Assignment, ClientInfo
from rolora.algorithm.method import ServerState
from rolora.algorithm.reduce import mean
from rolora.algorithm.step import Aggregation
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.methods import get_method
from rolora.model.base import Base, with_bank
from rolora.model.peft import LoraSettings, above_encoder
from rolora.plan.estimate import estimate_run
from rolora.plan.meta_model import SHAPES
from rolora.plan.needs import Plan, make_plan
from rolora.run.experiment import Experiment
from rolora.tasks.causal_lm import causal_lm
from rolora.tasks.classification import classification
from rolora.tasks.registry import Task
from rolora.training.client_store import ClientStore
from rolora.training.engine import InProcess, Job
from rolora.training.local import Work, train_group
from rolora.training.rounds import Federation, RoundResult, RunState, federate
from rolora.training.settings import LocalSettings

CLIENTS, ROWS = 2, 2  # of each client, in one step
LLAMA_3_2_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TEXTS = [4 * f"{SENTENCES[number % len(SENTENCES)]} " for number in range(CLIENTS * ROWS)]


@dataclass(frozen=True)
class Place:
    """A model with clients that hold two rows each, and what was planned for them."""

    base: Base
    engine: InProcess
    config: RunConfig
    planned: Plan

    def start(self) -> AdapterState:
        """Where all clients start."""
        return get_method("rolora").init(self.base.specs, torch.Generator().manual_seed(0))

    def rounds(self) -> list[RoundResult]:
        """One round that trains B and one that trains A."""
        federation = Federation(
            method=get_method("rolora"),
            engine=self.engine,
            aggregation=Aggregation(mean()),
            ranks=self.config.lora.ranks,
            seed=0,
            rounds=2,
            lr=lambda round: 1e-2,
        )
        results = federate(federation, RunState(ServerState(self.start())))
        return [result for result in results if result.round]


def _config(folder: Path, path: str, task: str, dtype: str, **data: Any) -> RunConfig:
    tables = {
        "offline": True,
        "model": {"path": path, "task": task, "dtype": dtype},
        "lora": {"rank": 8, "alpha": 32},
        "data": {"train": "away.csv", "max_length": 16, **data},
        "partition": {"clients": CLIENTS},
        "train": {"rounds": 2, "local_steps": 1, "batch_size": ROWS, "bank": CLIENTS},
    }
    return make_config(tables, root=folder)


def _place(base: Base, task: Task, config: RunConfig, table: pa.Table, folder: Path) -> Place:
    examples = task.encode(table, "rows")
    shards = {f"{n:04d}": torch.arange(n * ROWS, (n + 1) * ROWS) for n in range(CLIENTS)}
    settings = LocalSettings(steps=1, batch_size=ROWS)
    store = ClientStore(folder / "clients")
    engine = InProcess(base, task, examples, shards, settings, store, bank_size=CLIENTS)
    return Place(base, engine, config, make_plan(Experiment(config)))


def roberta_large(folder: Path) -> Place:
    """All 24 layers, 355 M parameters in float32."""
    shape = json.loads((SHAPES / "roberta-large.json").read_text())
    model = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**shape, num_labels=2)
    )
    head = {name for name, _ in model.named_parameters() if above_encoder(model, name)}
    base = with_bank(
        model, word_tokenizer(), "classification", LoraSettings(8, 32.0), "roberta-large", head
    )
    task = classification(base, ["0", "1"], ["text"], "label", 16)
    table = pa.table({"text": TEXTS, "label": [row % 2 for row in range(len(TEXTS))]})
    config = _config(folder, "roberta-large", "classification", "fp32")
    return _place(base, task, config, table, folder)


def llama_2_7b_two_layers(folder: Path) -> Place:
    """2 of 32 layers, 4096 wide, 32,000 words: 667 M parameters in bfloat16."""
    shape = json.loads((SHAPES / "meta-llama--Llama-2-7b-hf.json").read_text())
    layout = transformers.AutoConfig.for_model(**{**shape, "num_hidden_layers": 2})
    layout.save_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_config(layout, dtype=torch.bfloat16)
    tokenizer = chat_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    base = with_bank(model, tokenizer, "causal_lm", LoraSettings(8, 32.0), "llama")
    task = causal_lm(base, prompt="text", completion="more", messages=None, max_length=16)
    table = pa.table({"text": ["the"] * len(TEXTS), "more": TEXTS})
    columns = {"prompt": "text", "completion": "more"}
    config = _config(folder, "model", "causal_lm", "bf16", **columns)
    return _place(base, task, config, table, folder)


@pytest.mark.slow
@pytest.mark.parametrize("make", [roberta_large, llama_2_7b_two_layers])
def test_a_round_of_each_kind_at_full_width_is_exact_and_sends_what_was_planned(
    tmp_path: Path, make: Any
) -> None:
    place: Place = make(tmp_path)
    (planned,) = place.planned.methods
    first, second = place.rounds()
    states = [place.start(), first.state.server.adapter, second.state.server.adapter]
    for result, before, after in zip((first, second), states, states[1:], strict=False):
        assert result.advanced
        assert not result.rejected
        moving, frozen = ("B", "A") if result.round == 1 else ("A", "B")
        for name, tensor in after.items():
            if f"lora_{frozen}" in name:
                assert torch.equal(tensor, before[name]), name
        assert any(not torch.equal(after[n], before[n]) for n in after if f"lora_{moving}" in n)
        assert result.aggregation_error is not None
        assert result.aggregation_error < 1e-6
        (plan,) = (each for each in planned.rounds if each.factors == moving)
        assert result.bytes_up == CLIENTS * plan.up
    assert first.bytes_down == CLIENTS * planned.first_down
    assert [first.bytes_up + second.bytes_up, first.bytes_down + second.bytes_down] == [
        planned.up,
        planned.down,
    ]
    parameters = sum(p.numel() for p in place.base.model.parameters())
    assert place.planned.parameters == parameters


@pytest.mark.slow
@pytest.mark.parametrize("make", [roberta_large, llama_2_7b_two_layers])
def test_a_step_at_full_width_takes_the_memory_that_was_planned(tmp_path: Path, make: Any) -> None:
    place: Place = make(tmp_path)
    (planned,) = place.planned.methods
    method, server = get_method("rolora"), ServerState(place.start())
    for round, plan in enumerate(planned.rounds, start=1):
        cohort = tuple(
            Assignment(ClientInfo(id, ROWS, 8, round), server.adapter) for id in place.engine.shards
        )
        job = Job(replace(server, round=round - 1), cohort, 0, 1e-2)
        peak = allocated(partial(list, place.engine.run(method, job)))
        assert plan.peak is not None
        assert plan.peak - place.planned.weights == pytest.approx(peak, rel=0.15)


def long_rows(folder: Path, task: str, layers: int, tokens: int = 4096) -> RunConfig:
    """A model of a billion parameters with so many of its 16 layers, and rows of so many tokens."""
    layout = transformers.AutoConfig.for_model("llama", **LLAMA_3_2_1B, num_hidden_layers=layers)
    layout.save_pretrained(folder / "model")
    tables = {
        "offline": True,
        "model": {"path": "model", "task": task, "dtype": "bf16"},
        "lora": {"rank": 8},
        "data": {"train": "away.csv", "max_length": tokens},
        "partition": {"clients": 1},
        "train": {"rounds": 2, "local_steps": 1, "batch_size": 1, "bank": 1, "recompute": True},
    }
    columns = {"causal_lm": ["completion"], "preference": ["chosen", "rejected"]}
    return make_config(tables, [f"data.{name}={name}" for name in columns[task]], root=folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_logits_of_a_long_row_are_never_all_in_memory(tmp_path: Path, task: str) -> None:
    planned = make_plan(Experiment(long_rows(tmp_path, task, layers=16)))
    assert planned.parameters == 1_235_814_400
    tokens = 4096 * (2 if task == "preference" else 1)
    logits = tokens * LLAMA_3_2_1B["vocab_size"] * torch.float32.itemsize
    for step in planned.methods[0].rounds:
        assert step.peak is not None
        assert step.peak - planned.weights < logits / 2


@pytest.mark.slow
@pytest.mark.parametrize(("task", "tokens"), [("causal_lm", 4096), ("preference", 1024)])
def test_a_step_on_a_long_row_takes_the_memory_that_was_planned(
    tmp_path: Path, task: str, tokens: int
) -> None:
    config = long_rows(tmp_path, task, 2, tokens)
    shape = estimate_run(Experiment(config))
    (planned,) = make_plan(Experiment(config)).methods
    layout = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_config(layout, dtype=torch.bfloat16)
    base = with_bank(model, shape.outline.base.tokenizer, "causal_lm", LoraSettings(8, 8.0), "")
    assert base.stack is not None
    base.stack.checkpointing = True
    method, settings = get_method("rolora"), LocalSettings(steps=1, batch_size=1)
    work = [Work("", torch.arange(1), method.init(base.specs, torch.Generator()), steps=1)]
    parts = base, shape.experiment.task, shape.examples, work, method, settings
    for round, plan in enumerate(planned.rounds, start=1):
        peak = allocated(partial(train_group, *parts, lr=1e-2, seed=0, round=round))
        assert plan.peak is not None
        assert plan.peak - shape.weights == pytest.approx(peak, rel=0.15)
