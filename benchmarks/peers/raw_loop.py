"""The bare training that a federation contains: the same steps on one PEFT model, in turn.

Timed: forward, backward and AdamW on ready batches. Not there: clients, fresh optimisers, adapters
going in and out, averaging, evaluation. Nothing that trains these batches this way can do less.

    python -m benchmarks.peers.raw_loop JOB_FOLDER
"""

from __future__ import annotations

import sys

from peft import set_peft_model_state_dict

from benchmarks.party import Answer, serve
from benchmarks.peers.client import freeze, optimizer, peft_model, read_job, train

if __name__ == "__main__":
    job = read_job(sys.argv[1])
    model = peft_model(job)

    def prepare() -> None:
        set_peft_model_state_dict(model, dict(job.start))

    def run() -> Answer:
        for number, plan in enumerate(job.rounds, start=1):
            freeze(model, plan["trainable"])
            adamw = optimizer(model, job)
            for client in plan["cohort"]:
                train(model, job.of(number, client), adamw)
        return {"units": job.client_steps}

    serve(run, prepare)
