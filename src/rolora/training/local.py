"""Passes through the bank: local training of a group of clients, a first gradient, evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rolora.algorithm.adapter import LARGEST, AdapterState, layer_of, role_of, too_large
from rolora.algorithm.factors import zero_deltas
from rolora.algorithm.method import Method, lora_init
from rolora.algorithm.seeding import derived_seed, generator
from rolora.data.examples import Batch, Examples, collate, moved
from rolora.errors import RoloraError
from rolora.model.bank import row_keys
from rolora.model.base import Base
from rolora.tasks.registry import Task
from rolora.training.optimizer import LocalOptimizer
from rolora.training.settings import LocalSettings

SETTLED = 100  # steps until losses are looked at, if no client leaves before
_LESS = "lower train.lr, set train.max_grad_norm, or use model.dtype = 'fp32'"


class NonFiniteLoss(RoloraError):
    """A client's loss or weights became NaN or infinite, or grew without end: the run stops."""


@dataclass(frozen=True)
class Work:
    """One client's part of a round: its rows (int64 indices), where it starts, how many steps.

    ``moments``: the state of its optimiser, as ``Trained`` has it.
    """

    client: str
    rows: Tensor
    start: AdapterState
    steps: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A client after its last step; ``loss`` is the mean over its steps.

    ``moved`` counts the tensors that are not, to the bit, what the client started from. ``moments``
    is the state of its optimiser if that is kept: KEY/TENSOR -> value.
    """

    adapter: AdapterState
    loss: float
    steps: int
    moved: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)


def batches(work: Work, batch_size: int, seed: int, round: int) -> Iterator[Tensor]:
    """Row indices of a client's batches: a new permutation per epoch, whose last batch is short."""
    rng = generator(seed, "batches", round, work.client)
    while True:
        order = work.rows[torch.randperm(len(work.rows), generator=rng)]
        yield from torch.split(order, batch_size)


def train_group(
    base: Base,
    task: Task,
    examples: Examples,
    work: Sequence[Work],
    method: Method,
    settings: LocalSettings,
    *,
    lr: float,
    seed: int,
    round: int,
) -> list[Trained]:
    """Train these clients together; the result is as if each had trained alone.

    Clients with fewer steps leave the bank early, with their optimiser state. Raises NonFiniteLoss
    naming the client, for a loss that is not finite or weights that are beyond ``LARGEST``.
    """
    bank, gradient, penalty = base.bank, method.gradient, method.penalty
    order = sorted(range(len(work)), key=lambda i: -work[i].steps)
    active = [work[i] for i in order]
    trained: dict[int, Trained] = {}
    prepared = _batches(base, examples, active, settings.batch_size, seed, round)
    seeds = [derived_seed(seed, "dropout", round, w.client) for w in active]
    bank.load([w.start for w in active])
    optimizer = LocalOptimizer(bank, settings, lr, [w.moments for w in active])
    total = torch.zeros(len(active), dtype=torch.float64)
    told: list[Tensor] = []  # each client's loss per step, where the model computes

    def settle(steps: int) -> None:
        """Look at what the clients still here lost in their last steps, of so many taken.

        Until then the host waits for no result of a GPU.
        """
        if not told:
            return
        losses = torch.stack(told).cpu()
        _refuse_nonfinite(losses, active, round, steps - len(told))
        for each in losses.double():
            total[: len(each)] += each
        told.clear()

    def finish(first: int) -> None:
        """Take the clients from this place on out of the bank."""
        for place in range(first, bank.clients):
            start, steps = active[place].start, active[place].steps
            ended, loss = bank.take(place), float(total[place]) / max(steps, 1)
            moved = [name for name, tensor in ended.items() if not start.holds(name, tensor)]
            if diverged := next((name for name in moved if too_large(ended[name])), None):
                raise NonFiniteLoss(
                    f"{diverged} of client {active[place].client!r} is not finite, or beyond "
                    f"{LARGEST:g}, at the end of round {round}: {_LESS}"
                )
            moments = optimizer.moments(place, start) if settings.kept else {}
            trained[order[place]] = Trained(ended, loss, steps, len(moved), moments)

    try:
        sizes, batch = next(prepared)
        for step in range(active[0].steps):
            staying = len(sizes)
            if staying < bank.clients or step % SETTLED == 0:
                settle(step)
            if staying < bank.clients:
                finish(staying)
                bank.keep(staying)
                optimizer.keep(staying)
            roles = method.trainable(round, step)
            bank.train(roles | settings.kept)
            keys = row_keys(seeds[:staying], step, sizes) if bank.dropout else None
            losses = _losses(base, task, batch, sizes, keys)
            total_loss = losses.sum()
            if penalty is not None:
                held = map(bank.view, range(staying))
                here = ({n: x.to(base.device) for n, x in view.items()} for view in held)
                total_loss = total_loss + sum(map(penalty, here))
            total_loss.backward()  # type: ignore[no-untyped-call]
            if gradient is not None:
                for name, leaf in bank.leaves.items():
                    if leaf.grad is not None:
                        leaf.grad = gradient(name, leaf.grad, bank.leaves)
            if settings.max_grad_norm is not None:
                for moves in (True, False):
                    part = [x for n, x in bank.leaves.items() if (role_of(n) in roles) == moves]
                    _clip_gradients(part, settings.max_grad_norm)
            optimizer.step(roles)
            sizes, batch = next(prepared, (sizes, batch))  # while a GPU is still at this one
            told.append(losses.detach())
        settle(active[0].steps)
        finish(0)
    finally:
        bank.unload()
    return [trained[place] for place in range(len(work))]


def _batches(
    base: Base, examples: Examples, active: Sequence[Work], batch_size: int, seed: int, round: int
) -> Iterator[tuple[list[int], Batch]]:
    """Per step: the number of rows of each client, and the batch of all their rows, in order.

    ``active`` is ordered by steps, most first; clients without a step left have no rows in it.
    """
    streams = [batches(work, batch_size, seed, round) for work in active]
    for step in range(active[0].steps):
        staying = sum(work.steps > step for work in active)
        rows = [next(stream) for stream in streams[:staying]]
        batch = collate(examples, torch.cat(rows), base.tokenizer.pad_token_id)
        yield [len(chosen) for chosen in rows], batch.to(base.device)


def _losses(
    base: Base, task: Task, batch: Batch, sizes: Sequence[int], keys: Tensor | None
) -> Tensor:
    """Each client's mean loss over its rows, (K,); ``keys`` seed the dropout of every row."""
    clients = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    clients = moved(clients, base.device)
    with base.running(batch, sizes, keys) as given:
        each, count = task.loss(base.model, given)
    summed = each.new_zeros(len(sizes)).index_add(0, clients, each)
    return summed / count.new_zeros(len(sizes)).index_add(0, clients, count)


def _refuse_nonfinite(losses: Tensor, active: Sequence[Work], round: int, first: int) -> None:
    """``losses`` (steps, clients), of which ``first`` were before; the first bad one is named."""
    for step, place in (~losses.isfinite()).nonzero().tolist():
        raise NonFiniteLoss(
            f"the loss of client {active[place].client!r} is not finite in round {round}, local "
            f"step {first + step + 1}: {_LESS}"
        )


def _clip_gradients(leaves: Iterable[Tensor], max_norm: float) -> None:
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if not gradients:
        return
    norms = [g.flatten(1).square().sum(dim=1).to(gradients[0].device) for g in gradients]
    square = torch.stack(norms).sum(dim=0)
    scale = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        each = scale.to(gradient.device).view(-1, *[1] * (gradient.dim() - 1))
        gradient.mul_(each)


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


def evaluate(
    base: Base, task: Task, examples: Examples, adapter: AdapterState, batch_size: int = 64
) -> dict[str, float]:
    """The task's metrics for one adapter on these rows."""
    with base.holding(adapter):
        return task.score(outputs(base, task, examples, batch_size), examples)


def outputs(base: Base, task: Task, examples: Examples, batch_size: int = 64) -> Tensor:
    """The task's outputs for these rows, (rows, width), batched by length; the bank holds the
    adapter."""
    rows = in_batches(examples, batch_size)
    return in_order(examples, outputs_of(base, task, examples, rows))


def in_batches(examples: Examples, batch_size: int = 64) -> tuple[Tensor, ...]:
    """The rows by length, in batches of indices (int64)."""
    return torch.split(examples.lengths.argsort(stable=True), batch_size)


def outputs_of(
    base: Base, task: Task, examples: Examples, batches: Iterable[Tensor]
) -> list[Tensor]:
    """The task's outputs for each of these batches; the bank holds the adapter."""
    pad = base.tokenizer.pad_token_id
    found: list[Tensor] = []
    with torch.inference_mode():
        for rows in batches:
            batch = collate(examples, rows, pad).to(base.device)
            with base.running(batch) as given:
                found.append(task.outputs(base.model, given).cpu())
    return found


def in_order(examples: Examples, outputs: Sequence[Tensor]) -> Tensor:
    """The outputs of all batches by row, (rows, width)."""
    return torch.cat(list(outputs))[examples.lengths.argsort(stable=True).argsort()]
