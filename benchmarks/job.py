"""A federated job written out, so that parties that share no code do the same work.

``write_job`` takes rolora's own configuration and draws its cohorts and batches for every round;
the folder then holds the start adapter, each client's batches (token ids, padded to the longest row
of the batch), the test rows, and the settings.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rolora.algorithm.adapter import ClientInfo
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.data.examples import Examples, collate
from rolora.files import write_file
from rolora.run.experiment import Experiment
from rolora.training.engine import InProcess
from rolora.training.local import Work, batches
from rolora.training.rounds import sample_cohort

LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["query", "value"]}


def lengthened(source: Path, target: Path, questions: int, rows: int) -> Path:
    """A CSV of ``rows`` rows of several questions each, the first one's label on top.

    Cut to max_length they all have the same number of tokens, so that no party pads.
    """
    with source.open(newline="") as file:
        table = list(csv.DictReader(file))
    random.Random(0).shuffle(table)
    turns = itertools.cycle(table)
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            some = [next(turns) for _ in range(questions)]
            writer.writerow([" ".join(one["text"] for one in some), some[0]["label"]])
    return target


def configuration(
    model: Path,
    train: Path,
    test: Path,
    *,
    max_length: int,
    clients: int,
    layers: str = "all",
    dtype: str = "fp32",
    **settings: Any,
) -> RunConfig:
    """RoLoRA on the questions, as every bench runs it: rank 4 on query and value, AdamW, no decay.

    ``layers`` carry adapters; the base is in ``dtype``. ``settings`` are keys of ``[train]``, or
    whole tables.
    """
    tables: dict[str, Any] = {
        key: settings.pop(key) for key in ("eval", "method") if key in settings
    }
    return make_config(
        {
            "name": "bench",
            "model": {"path": str(model), "task": "classification", "dtype": dtype},
            "lora": {**LORA, "layers": layers},
            "data": {"train": str(train), "test": str(test), "max_length": max_length},
            "partition": {"scheme": "iid", "clients": clients},
            "train": {"lr": 5e-3, "cache": "", **settings},
            **tables,
        }
    )


def write_job(config: RunConfig, folder: Path, rounds: int, *, threads: int, actors: int) -> Path:
    """Write the first ``rounds`` rounds of this run into ``folder``.

    Every party computes with ``threads`` torch threads; one made of several processes (Flower's on
    Ray) has ``actors`` of them, which share the threads, with one each at least.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(config, folder / "clients")
    tensors: dict[str, Tensor] = {}
    plan = [_round(experiment, number, tensors) for number in range(1, rounds + 1)]
    save_file(tensors, folder / "batches.safetensors")
    save_file(dict(experiment.start.server.adapter), folder / "start.safetensors")
    save_file(_padded_tests(experiment), folder / "test.safetensors")
    job = {
        "model": config.model.path,
        "labels": len(experiment.labels),
        **LORA,
        "layers": experiment.base.peft_config.layers_to_transform,
        "lr": config.train.lr,
        "dtype": "bfloat16" if config.model.dtype == "bf16" else "float32",
        "threads": threads,
        "actors": actors,
        "clients": len(experiment.federation.engine.clients()),
        "evaluated": [n for n in range(rounds + 1) if n in experiment.federation.evaluated_rounds],
        "rounds": plan,
    }
    write_file(folder / "job.json", json.dumps(job) + "\n")
    write_file(folder / "config.json", config.model_dump_json(exclude_none=True))
    return folder


def _round(experiment: Experiment, number: int, tensors: dict[str, Tensor]) -> Mapping[str, Any]:
    """One round: what is trained and who takes part; its batches go into ``tensors``."""
    run, config = experiment.federation, experiment.config
    engine = run.engine
    assert isinstance(engine, InProcess)
    clients, cohort = engine.clients(), []
    ranks = config.lora.ranks(clients)
    for client in sample_cohort(list(clients), run.participation, run.seed, number, 0):
        info = ClientInfo(client, clients[client], ranks[client], number)
        steps = engine.settings.num_steps(info.num_examples)
        work = Work(client, engine.shards[client], experiment.start.server.adapter, steps)
        drawn = batches(work, config.train.batch_size, config.seed, number)
        for step, rows in enumerate(itertools.islice(drawn, steps)):
            _add_batch(experiment, engine.examples, rows, f"{number}/{client}/{step}", tensors)
        cohort.append({"id": client, "num_examples": info.num_examples, "steps": steps})
    return {"trainable": sorted(run.method.trainable(number, 0)), "cohort": cohort}


def _padded_tests(experiment: Experiment, rows: int = 64) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    test = experiment.test
    order = test.lengths.argsort(stable=True)
    for index, chosen in enumerate(torch.split(order, rows)):
        _add_batch(experiment, test, chosen, str(index), tensors)
    return tensors


def _add_batch(
    experiment: Experiment, examples: Examples, rows: Tensor, name: str, tensors: dict[str, Tensor]
) -> None:
    batch = collate(examples, rows, experiment.base.tokenizer.pad_token_id)
    for key, tensor in {**batch.inputs, "labels": batch.targets}.items():
        tensors[f"{name}.{key}"] = tensor.contiguous()
