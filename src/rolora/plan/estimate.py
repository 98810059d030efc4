"""What is known of a run without its weights: the model's shapes, the clients, the rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.algorithm.seeding import generator
from rolora.config.schema import TrainConfig
from rolora.data.examples import Batch, Examples, collate
from rolora.errors import NotHere
from rolora.model.checkpoint import WIDTHS
from rolora.plan.cost import StepCost, step_cost
from rolora.plan.meta_model import Outline, outline
from rolora.run.experiment import Experiment
from rolora.run.settings import base_dtype, local_settings, lora_settings, revisits
from rolora.run.shards import Rows
from rolora.tasks.registry import TaskKind
from rolora.training.rounds import cohort_size

SAMPLE = 2000  # rows that are tokenised to measure their length
DRAWS = 100  # batches drawn to find a long one


@dataclass(frozen=True)
class Estimate:
    """A run before it is built.

    ``experiment``: its base has shapes only. ``examples``: a sample of the training rows, or one
    row of the maximum length. ``sizes``: client -> num_examples. ``rows``: None if the data is not
    on this machine. ``weights``: bytes of the model in memory, in ``dtype``. ``cached``: the
    outputs of the layers below the adapters are computed once and read from disk.
    """

    experiment: Experiment
    outline: Outline
    examples: Examples
    sizes: Mapping[str, int]
    rows: Rows | None
    dtype: str
    weights: int
    cached: bool
    notes: tuple[str, ...]
    costs: dict[Hashable, StepCost | None] = field(default_factory=dict)

    @property
    def cohort(self) -> int:
        """Clients of a round."""
        return cohort_size(len(self.sizes), self._train.participation)

    @property
    def tokens(self) -> int:
        """Mean tokens of one client's step."""
        return max(1, round(self._length * self._train.batch_size))

    @property
    def _train(self) -> TrainConfig:
        return self.experiment.config.train

    @property
    def _length(self) -> float:
        return float(self.examples.lengths.double().mean())

    @property
    def steps(self) -> float | None:
        """Mean steps of a client in a round; None for epochs over rows that are not here."""
        settings = local_settings(self._train)
        if self.rows is None and settings.epochs is not None:
            return None
        return sum(map(settings.num_steps, self.sizes.values())) / len(self.sizes)

    @property
    def cache(self) -> int | None:
        """Bytes on disk of the cached outputs for all rows; None if the rows are not here."""
        if not self.cached:
            return 0
        if self.rows is None:
            return None
        count = int(self.rows.train.num_rows + self.rows.test.num_rows)
        return round(count * self._length * self._width * self.outline.base.dtype.itemsize)

    @property
    def _width(self) -> int:
        config: Any = self.outline.base.model.config
        return int(config.hidden_size)

    def batch(self, clients: int) -> Batch:
        """A batch for this many clients: the one with the most tokens of ``DRAWS`` draws."""
        rng = generator(self.experiment.config.seed, "plan")
        size = clients * self._train.batch_size
        drawn = torch.randint(len(self.examples), (DRAWS, size), generator=rng)
        rows = drawn[self.examples.lengths[drawn].sum(dim=1).argmax()]
        base = self.outline.base
        batch = collate(self.examples, rows, base.tokenizer.pad_token_id)
        if not self.cached:
            return batch
        shape = int(batch.lengths.sum()), self._width
        with self.outline.mode:
            prefix = torch.empty(shape, dtype=base.dtype)
        return replace(batch, prefix=prefix)

    def cost(self, start: AdapterState, roles: Roles, clients: int) -> StepCost | None:
        """The cost of a step of this many clients; None if the model cannot run on shapes alone.

        Computed once per layout, since methods that train the same tensors share it.
        """
        key = (frozenset((name, tensor.shape) for name, tensor in start.items()), roles, clients)
        if key not in self.costs:
            sizes = [self._train.batch_size] * clients
            batch = self.batch(clients)
            try:
                found = step_cost(self.outline, self.experiment.task, batch, sizes, start, roles)
            except RuntimeError:  # a layer depends on values, and shapes have none
                found = None
            self.costs[key] = found
        return self.costs[key]


def estimate_run(run: Experiment) -> Estimate:
    """The configured run, with its rows if they are on this machine.

    Raises ConfigError or DataError as a run would.
    """
    config = run.config
    here = Experiment(config.model_copy(update={"offline": True}))
    rows: Rows | None = None
    labels: Sequence[str] = ()
    notes: list[str] = []
    try:
        rows, labels = here.rows, here.labels
    except NotHere as missing:
        clients = config.partition.clients
        source = f"{missing.source} is not on this machine"
        notes.append(f"{source}: {clients} clients are assumed (partition.clients)")
        if here.kind.labelled:
            labels = ("0", "1")
            notes.append("2 labels are assumed")
    drawn, dtype = _outline(run, labels)
    if config.model.dtype == "auto":
        faster = "; a run takes bf16 where it is faster" if config.device == "cpu" else ""
        notes.append(f"model.dtype = 'auto' is assumed to be {dtype}{faster}")
    if config.model.device_map == "auto":
        notes.append("memory is that of all GPUs together (model.device_map)")
    base = drawn.base
    if base.stack is not None:
        base.stack.checkpointing = config.train.recompute
    drawn_run = Experiment(config, labels=labels, base=base)
    limit = base.limit(config.data.max_length).tokens
    if rows is not None and drawn.tokenizer:
        order = torch.randperm(rows.train.num_rows, generator=generator(0, "plan"))[:SAMPLE]
        examples = drawn_run.task.encode(rows.train.take(order.tolist()), config.data.train)
    else:
        examples = _longest(limit, here.kind, len(labels))
        notes.append(f"every row is assumed to have {limit} tokens")
    if rows is not None:
        each = len(examples) / min(SAMPLE, rows.train.num_rows) if drawn.tokenizer else 1
        sizes = {client: round(each * len(shard)) for client, shard in rows.shards.items()}
    else:
        settings = local_settings(config.train)
        size = (settings.steps or 1) * settings.batch_size
        sizes = {f"{number:04d}": size for number in range(config.partition.clients)}
    cached = bool(config.train.cache) and revisits(config.train, [*sizes.values()])
    cached = cached and base.stack is not None and base.stack.lowest > 0
    weights = _weights(base.model, dtype)
    return Estimate(drawn_run, drawn, examples, sizes, rows, dtype, weights, cached, tuple(notes))


def _outline(run: Experiment, labels: Sequence[str]) -> tuple[Outline, str]:
    """The model's shapes, and its dtype by name."""
    config = run.config
    wanted, dtype = config.model.dtype, base_dtype(config.model.dtype, config.device)
    drawn = outline(
        config.model.path,
        run.kind.head,
        lora_settings(config.lora),
        root=config.root,
        labels=labels,
        dtype=dtype,
        offline=config.offline,
    )
    if wanted != "auto":
        return drawn, wanted
    return drawn, "bf16" if dtype == torch.bfloat16 else "fp32"


def _weights(model: Any, dtype: str) -> int:
    """Bytes of the weights in memory; with int8 or nf4, of fewer in linear layers below a head."""
    tensors = [*model.parameters(), *model.buffers()]
    total: int = sum(t.numel() * t.dtype.itemsize for t in tensors)
    if dtype not in WIDTHS:
        return total
    encoder = model.get_submodule(model.base_model_prefix)
    linears = [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
    return total - round(sum(w.numel() * (w.dtype.itemsize - WIDTHS[dtype]) for w in linears))


def _longest(length: int, kind: TaskKind, labels: int) -> Examples:
    """One row of this length; of a language model's row every token is a target.

    Of a row that is two token sequences each has this length.
    """
    targets = {
        "causal_lm": torch.ones(length, dtype=torch.uint8),
        "classification": torch.zeros(1, dtype=torch.int64),
        "multi_label": torch.zeros(1, labels),
        "regression": torch.zeros(1),
    }[kind.head]
    tokens = torch.full((length,), 2, dtype=torch.int32)
    if not kind.compares:
        return Examples(tokens, torch.tensor([0, length]), targets)
    return Examples(
        tokens.repeat(2),
        torch.tensor([0, 2 * length]),
        targets.repeat(2),
        answers=torch.ones(1, dtype=torch.int64),
        seconds=torch.tensor([length]),
        reference=torch.zeros(1, 4),
    )
