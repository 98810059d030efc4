"""Flower's simulation on Ray: a ClientApp that trains, a FedAvg strategy that alternates factors.

Timed: ``strategy.start`` over the job's rounds, with Ray's actors already up and the model loaded
in each (a user pays for that once a run; it is in the cold start). There is an actor for every
core, which the parties in one process do not have: wall times show what that gains, CPU times what
it costs. The server sends the whole adapter and gets back the factor that moved.

    python -m benchmarks.peers.flower JOB_FOLDER [ADAPTER_FILE]
"""

from __future__ import annotations

import os
import sys
import time
from functools import lru_cache
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.party import Answer, serve
from benchmarks.peers.client import (
    Job,
    accuracy,
    freeze,
    moving,
    optimizer,
    peft_model,
    read_job,
    train,
)

client_app = ClientApp()
server_app = ServerApp()


@lru_cache(maxsize=1)
def loaded(folder: str) -> tuple[Job, Any]:
    """The job and the model, loaded once in each process."""
    job = read_job(folder, actor=True)
    return job, peft_model(job)


@client_app.train()  # type: ignore[untyped-decorator]
def train_client(message: Message, context: Context) -> Message:
    """One client, one round."""
    number = int(message.content["config"]["server-round"])
    job, model = loaded(os.environ["JOB_FOLDER"])
    plan = job.rounds[number - 1]
    client = plan["cohort"][int(context.node_config["partition-id"])]
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    freeze(model, plan["trainable"])
    train(model, job.of(number, client), optimizer(model, job))
    moved = moving(get_peft_model_state_dict(model), plan["trainable"])
    sent = {name: tensor.float() for name, tensor in moved.items()}  # numpy has no bfloat16
    metrics = MetricRecord({"num-examples": client["num_examples"]})
    content = RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics})
    return Message(content=content, reply_to=message)


class Alternating(FedAvg):  # type: ignore[misc]
    """FedAvg of what the clients send; the factor that stayed is put back beside it."""

    def __init__(self, start: ArrayRecord, clients: int) -> None:
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
        )
        self.whole = start

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """The averaged factor beside the one that stayed."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            self.whole = ArrayRecord({**self.whole, **arrays})
        return self.whole, metrics


@server_app.main()  # type: ignore[untyped-decorator]
def serve_jobs(grid: Grid, context: Context) -> None:
    """Answer the harness from inside one running simulation."""
    job, model = loaded(os.environ["JOB_FOLDER"])

    def run() -> Answer:
        started = time.perf_counter()
        curve: list[tuple[float, float]] = []

        def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            if number == 0 or not job.evaluated(number):
                return None
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            right = accuracy(model, job)
            curve.append((time.perf_counter() - started, right))
            return MetricRecord({"accuracy": right})

        start = ArrayRecord(dict(job.start))
        strategy = Alternating(start, job.settings["clients"])
        result = strategy.start(
            grid, initial_arrays=start, num_rounds=len(job.rounds), evaluate_fn=evaluate
        )
        if adapter := os.environ.get("ADAPTER_FILE"):
            save_file(result.arrays.to_torch_state_dict(), adapter)
        return {"units": job.client_steps, "curve": curve}

    serve(run)


def main(folder: str, *adapter: str) -> None:
    """Start Ray, and the simulation in it."""
    os.environ["JOB_FOLDER"] = folder
    if adapter:
        os.environ["ADAPTER_FILE"] = adapter[0]
    job = read_job(folder)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=job.settings["clients"],
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": job.settings["actors"], "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    # by its name, so that the actors import these apps instead of unpickling a copy
    from benchmarks.peers import flower

    flower.main(*sys.argv[1:])
