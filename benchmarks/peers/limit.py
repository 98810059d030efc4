"""What no training with a frozen base can undercut: its forward pass and its input's gradient.

Timed: one forward and one backward pass of the plain transformers model over all clients' rows of a
step at once, with a gradient at the embeddings and at no weight. No adapter, no optimiser.

    python -m benchmarks.peers.limit JOB_FOLDER
"""

from __future__ import annotations

import sys

import torch
import transformers

from benchmarks.party import Answer, serve
from benchmarks.peers.client import Batch, read_job

if __name__ == "__main__":
    job = read_job(sys.argv[1])
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        job.settings["model"], num_labels=job.settings["labels"], local_files_only=True
    ).eval()
    model.requires_grad_(False)

    def together(number: int, step: int) -> Batch:
        """All clients' batches of a step, one under another; their rows are of equal length."""
        cohort = job.rounds[number - 1]["cohort"]
        each = [job.of(number, client)[step] for client in cohort]
        return {key: torch.cat([batch[key] for batch in each]) for key in each[0]}

    numbers = range(1, len(job.rounds) + 1)
    steps = job.rounds[0]["cohort"][0]["steps"]
    passes = [together(number, step) for number in numbers for step in range(steps)]

    def run() -> Answer:
        for batch in passes:
            embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            inputs = {key: x for key, x in batch.items() if key != "input_ids"}
            model(inputs_embeds=embedded, **inputs).loss.backward()
        return {"units": job.client_steps}

    serve(run)
