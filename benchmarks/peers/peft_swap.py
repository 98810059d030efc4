"""A federation as a loop over one PEFT model: put a client's adapter in, train, take it out.

Timed: the whole of every round, with PEFT's own functions for adapter states, a fresh AdamW per
client, the weighted mean, and the job's evaluations.

    python -m benchmarks.peers.peft_swap JOB_FOLDER [ADAPTER_FILE]
"""

from __future__ import annotations

import sys
import time
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.party import Answer, serve
from benchmarks.peers.client import (
    Job,
    accuracy,
    freeze,
    mean,
    moving,
    optimizer,
    peft_model,
    read_job,
    train,
)


def federate(job: Job, model: Any, curve: list[tuple[float, float]]) -> dict[str, Tensor]:
    """The adapter after the job's rounds; ``curve`` grows by (seconds, accuracy)."""
    started = time.perf_counter()
    server = dict(job.start)
    for number, plan in enumerate(job.rounds, start=1):
        freeze(model, plan["trainable"])
        updates = []
        for client in plan["cohort"]:
            set_peft_model_state_dict(model, server)
            train(model, job.of(number, client), optimizer(model, job))
            sent = moving(get_peft_model_state_dict(model), plan["trainable"])
            update = {name: tensor.detach().clone() for name, tensor in sent.items()}
            updates.append((update, client["num_examples"]))
        server |= mean(updates)
        if job.evaluated(number):
            set_peft_model_state_dict(model, server)
            right = accuracy(model, job)
            curve.append((time.perf_counter() - started, right))
    return server


if __name__ == "__main__":
    job = read_job(sys.argv[1])
    model = peft_model(job)

    def run() -> Answer:
        curve: list[tuple[float, float]] = []
        server = federate(job, model, curve)
        if len(sys.argv) > 2:
            save_file(server, sys.argv[2])
        return {"units": job.client_steps, "curve": curve}

    serve(run)
