"""The gradient of the loss with respect to full weights, for methods that start from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.algorithm.adapter import layer_of
from rolora.algorithm.factors import zero_deltas
from rolora.algorithm.method import lora_init
from rolora.algorithm.seeding import generator
from rolora.data.examples import Examples, collate
from rolora.model.base import Base
from rolora.tasks.registry import Task


def first_gradient(
    base: Base,
    task: Task,
    examples: Examples,
    shards: Mapping[str, Tensor],
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """layer -> the gradient (out, in) of the mean loss at the base model's weights, float32, CPU.

    Each client takes one batch of its rows and is weighted by its number of rows (LoRA-SB,
    arXiv:2411.19557, section 3; across clients as Fed-SB, arXiv:2502.15436, Algorithm 1).
    """
    start = lora_init(base.specs, generator(seed, "init"))
    total = sum(len(rows) for rows in shards.values())
    with base.holding(start | zero_deltas(base.specs)):
        deltas = base.bank.deltas
        for delta in deltas.values():
            delta.requires_grad_(True)
        for client, rows in shards.items():
            draw = torch.randperm(len(rows), generator=generator(seed, "gradient", 0, client))
            chosen = rows[draw[:batch_size]]
            batch = collate(examples, chosen, base.tokenizer.pad_token_id).to(base.device)
            with base.running(batch) as given:
                each, count = task.loss(base.model, given)
            (len(rows) / total * each.sum() / count.sum()).backward()  # type: ignore[no-untyped-call]
        return {
            layer_of(name): delta.grad.cpu()
            for name, delta in deltas.items()
            if delta.grad is not None
        }
