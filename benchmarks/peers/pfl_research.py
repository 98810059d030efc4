"""Apple's pfl-research: FederatedAveraging on its SimulatedBackend, one model for all users.

Its PyTorchModel trains and averages whatever has gradients when it is built, so there is one for
each factor around the same PEFT model. Timed: the job's rounds, one central iteration each. It
evaluates every user in its first iteration; ``metrics`` answers without computing anything, so that
this costs it nothing. Users count alike and must have batches of one shape.

    python -m benchmarks.peers.pfl_research JOB_FOLDER [ADAPTER_FILE]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.party import Answer, serve
from benchmarks.peers.client import Job, freeze, peft_model, read_job

COLUMNS = ("input_ids", "attention_mask", "labels")


class Classifier(nn.Module):
    """The two functions that pfl asks of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        found: Tensor = self.model(**inputs).loss
        return found

    def metrics(self, input_ids: Tensor, *_: Tensor) -> dict[str, Any]:
        """The number of rows, and nothing that would take time."""
        return {"rows": Weighted(len(input_ids), 1)}


def pfl_model(classifier: Classifier, trainable: list[str]) -> Any:
    """pfl's model that trains these roles; central SGD with rate 1 puts the mean in place."""
    freeze(classifier, trainable)
    parameters = [p for p in classifier.parameters() if p.requires_grad]

    def fresh(_: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    return PyTorchModel(
        model=classifier,
        local_optimizer_create=fresh,
        central_optimizer=torch.optim.SGD(parameters, lr=1.0),
    )


def backend(job: Job, number: int) -> Any:
    """The users of a round, each with its rows in the order of the job's batches."""
    data: dict[str, tuple[Tensor, ...]] = {}
    for client in job.rounds[number - 1]["cohort"]:
        steps = job.of(number, client)
        data[client["id"]] = tuple(torch.cat([step[key] for step in steps]) for key in COLUMNS)

    def dataset(user: str) -> Any:
        return Dataset(raw_data=data[user], user_id=user)

    users = FederatedDataset(dataset, get_user_sampler("minimize_reuse", list(data)))
    return SimulatedBackend(training_data=users, val_data=users)


if __name__ == "__main__":
    job = read_job(sys.argv[1])
    classifier = Classifier(peft_model(job))
    models = {
        tuple(roles): pfl_model(classifier, roles)
        for roles in (plan["trainable"] for plan in job.rounds[:2])
    }
    backends = [backend(job, number) for number in range(1, len(job.rounds) + 1)]
    rows = len(next(iter(job.batches.values()))["labels"])

    def prepare() -> None:
        set_peft_model_state_dict(classifier.model, dict(job.start))

    def run() -> Answer:
        for number, plan in enumerate(job.rounds, start=1):
            freeze(classifier, plan["trainable"])
            FederatedAveraging().run(
                NNAlgorithmParams(
                    central_num_iterations=1,
                    evaluation_frequency=1,
                    train_cohort_size=len(plan["cohort"]),
                    val_cohort_size=0,
                ),
                backends[number - 1],
                models[tuple(plan["trainable"])],
                NNTrainHyperParams(
                    local_num_epochs=1,
                    local_learning_rate=job.settings["lr"],
                    local_batch_size=rows,
                ),
                send_metrics_to_platform=False,
            )
        if len(sys.argv) > 2:
            adapter = get_peft_model_state_dict(classifier.model)
            save_file({name: t.detach().clone() for name, t in adapter.items()}, sys.argv[2])
        return {"units": job.client_steps}

    serve(run, prepare)
