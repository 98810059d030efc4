"""A transformers ``Trainer`` per client, as its documentation trains a PEFT model.

Timed: for each client of each round, adapter in, a Trainer built, ``train()``, adapter out; then
the weighted mean. It is slow, so only the first ``CLIENTS`` of each cohort are trained; times are
per client step.

    python -m benchmarks.peers.trainer JOB_FOLDER CLIENTS
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from benchmarks.party import Answer, serve
from benchmarks.peers.client import Batch, freeze, mean, moving, peft_model, read_job

if __name__ == "__main__":
    job = read_job(sys.argv[1])
    model = peft_model(job)
    place = tempfile.mkdtemp()

    def arguments(batch_size: int) -> Any:
        return TrainingArguments(
            output_dir=place,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=job.settings["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch",
            adam_beta2=0.999,
            train_sampling_strategy="sequential",  # the job's batches in the job's order
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )

    def rows(batches: list[Batch]) -> list[Batch]:
        """Single rows; the Trainer puts them together again."""
        return [
            {key: tensor[index] for key, tensor in batch.items()}
            for batch in batches
            for index in range(len(batch["labels"]))
        ]

    def run() -> Answer:
        server, units = dict(job.start), 0
        for number, plan in enumerate(job.rounds, start=1):
            freeze(model, plan["trainable"])
            updates = []
            for client in plan["cohort"][: int(sys.argv[2])]:
                set_peft_model_state_dict(model, server)
                batches = job.of(number, client)
                size = len(batches[0]["labels"])
                Trainer(model=model, args=arguments(size), train_dataset=rows(batches)).train()
                sent = moving(get_peft_model_state_dict(model), plan["trainable"])
                update = {name: tensor.detach().clone() for name, tensor in sent.items()}
                updates.append((update, client["num_examples"]))
                units += client["steps"]
            server |= mean(updates)
        assert torch.isfinite(torch.stack([tensor.sum() for tensor in server.values()])).all()
        return {"units": units}

    serve(run)
