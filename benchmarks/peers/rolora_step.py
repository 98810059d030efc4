"""Local training of one group of clients, an A and a B round, and nothing around it.

Timed: cutting batches, forward, backward, AdamW. WAY is "packed" (as in a run), "padded" (the rows
padded to the longest, as without packing), "cached" (the layers below the adapters read from
disk; they were computed before the clock started), "lowest" (attention in the base's dtype where
rolora computes it in float32), or "profiled" (packed; the answer has the milliseconds of each of
``OPERATORS``).

    python -m benchmarks.peers.rolora_step JOB_FOLDER WAY
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.party import Answer, serve
from rolora.config.load import make_config
from rolora.model import packing
from rolora.run.experiment import Experiment
from rolora.training.engine import InProcess
from rolora.training.local import Work, train_group
from rolora.training.settings import LocalSettings

# what torch's names of operators begin with
OPERATORS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "indexing": ("aten::index", "aten::cat"),
    "copies and casts": ("aten::copy_",),
    "everything else": ("",),
}

if __name__ == "__main__":
    folder, way = Path(sys.argv[1]), sys.argv[2]
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    cache = str(folder / "cache") if way == "cached" else ""
    config = make_config(
        json.loads((folder / "config.json").read_text()),
        [f"train.cache={cache}", "train.rounds=1000"],
    )
    experiment = Experiment(config, folder / "clients")
    engine = experiment.federation.engine
    assert isinstance(engine, InProcess)
    examples = engine.examples
    if way == "lowest":
        packing._attention = lambda *given, mask, **named: sdpa_attention_forward(
            *given, mask, **named
        )
    base = replace(experiment.base, stack=None) if way == "padded" else experiment.base
    steps, size = int(config.train.local_steps or 0), config.train.batch_size
    start = experiment.start.server.adapter
    work = [Work(client, rows, start, steps) for client, rows in engine.shards.items()]
    settings = LocalSettings(steps=steps, batch_size=size)

    def run() -> Answer:
        for round in (1, 2):
            train_group(
                base,
                experiment.task,
                examples,
                work,
                experiment.method,
                settings,
                lr=config.train.lr,
                seed=0,
                round=round,
            )
        return {"units": 2 * steps * len(work)}

    def profiled() -> Answer:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            answer = run()
        spent = dict.fromkeys(OPERATORS, 0.0)
        for event in seen.key_averages():
            kind = next(kind for kind, names in OPERATORS.items() if event.key.startswith(names))
            spent[kind] += event.self_cpu_time_total / 1e3
        return {**answer, "operators": spent}

    serve(profiled if way == "profiled" else run)
