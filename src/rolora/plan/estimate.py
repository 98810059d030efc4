"""What can be known of a run whose model need not be here: shapes, who trains, on rows how long."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.algorithm.seeding import generator
from rolora.config.schema import RunConfig
from rolora.data.examples import Batch, Examples, collate, tokenizer_limit
from rolora.errors import NotHere
from rolora.plan.cost import StepCost, step_cost
from rolora.plan.meta_model import Outline, outline
from rolora.run.experiment import (
    Experiment,
    base_dtype,
    local_settings,
    lora_settings,
    revisits,
)
from rolora.run.shards import Rows
from rolora.tasks.registry import Head, Label, Task, TaskKind
from rolora.training.precision import WORTH, bf16_speed, is_wide

SAMPLE = 2000  # rows that are tokenised to see how long rows are
DRAWS = 100  # of a bank's rows, to find how many tokens a step has at most


@dataclass(frozen=True)
class Sketch:
    """A run before it is built.

    ``examples`` are some training rows, or one as long as can be; ``sizes`` maps client ->
    num_examples; ``rows`` counts training rows (None: they are not here); ``weights`` is the bytes
    of the model in memory, in ``dtype``; ``skips`` says that the layers below the adapters run
    once and for all.
    """

    config: RunConfig
    outline: Outline
    task: Task
    examples: Examples
    sizes: Mapping[str, int]
    rows: Rows | None
    dtype: str
    weights: int
    skips: bool
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of one client's step, on average."""
        mean = float(self.examples.lengths.double().mean())
        return max(1, round(mean * self.config.train.batch_size))

    @property
    def steps(self) -> float | None:
        """A client's steps in a round, on average; None for epochs over rows that are not here."""
        settings = local_settings(self.config.train)
        if self.rows is None and settings.epochs is not None:
            return None
        return sum(map(settings.num_steps, self.sizes.values())) / len(self.sizes)

    @property
    def cache(self) -> int | None:
        """Bytes of what leaves the layers below the adapters, for all rows; None: not known."""
        if not self.skips:
            return 0
        if self.rows is None:
            return None
        base = self.outline.base
        rows = self.rows.train.num_rows + self.rows.test.num_rows
        config: Any = base.model.config
        width = int(config.hidden_size)
        mean = float(self.examples.lengths.double().mean())
        return int(rows * mean * width * base.dtype.itemsize + 0.5)

    def batch(self, clients: int) -> Batch:
        """Rows of a step of so many clients: of some draws the one with the most tokens."""
        rng = generator(self.config.seed, "plan")
        size = clients * self.config.train.batch_size
        drawn = torch.randint(len(self.examples), (DRAWS, size), generator=rng)
        rows = drawn[self.examples.lengths[drawn].sum(dim=1).argmax()]
        base = self.outline.base
        batch = collate(self.examples, rows, base.tokenizer.pad_token_id)
        if not self.skips:
            return batch
        config: Any = base.model.config
        shape = int(batch.lengths.sum()), int(config.hidden_size)
        with self.outline.mode:
            prefix = torch.empty(shape, dtype=base.dtype)
        return replace(batch, prefix=prefix)


@dataclass(frozen=True)
class Steps:
    """Steps run on shapes alone, each once: methods that train the same share them."""

    drawn: Sketch
    seen: dict[Hashable, StepCost | None]

    def cost(self, start: AdapterState, roles: Roles, clients: int) -> StepCost | None:
        """Of a bank of so many clients; None if it cannot be known."""
        layout = frozenset((name, tensor.shape) for name, tensor in start.items())
        key = (layout, roles, clients)
        if key not in self.seen:
            each = self.drawn.config.train.batch_size
            batch = self.drawn.batch(clients)
            try:
                found = step_cost(
                    self.drawn.outline, self.drawn.task, batch, [each] * clients, start, roles
                )
            except RuntimeError:  # a layer that looks at values, and here there are none
                found = None
            self.seen[key] = found
        return self.seen[key]


def sketch(config: RunConfig) -> Sketch:
    """The configured run in outline; rows are read where they are on this machine.

    Raises ConfigError or DataError as a run would for what is here.
    """
    here = Experiment(config.model_copy(update={"offline": True}))
    rows, notes = _rows(here)
    labels: Sequence[Label] = ()
    if rows is not None:
        labels = here.labels
    elif here.kind.labelled:
        labels = (0, 1)
        notes.append("2 labels are assumed")
    drawn, dtype, weights = _outline(config, here.kind.head, labels, notes)
    task = Experiment(config, labels=labels, base=drawn.base).task
    limit = tokenizer_limit(drawn.base.tokenizer, drawn.base.model.config, config.data.max_length)
    if rows is not None and drawn.tokenizer:
        order = torch.randperm(rows.train.num_rows, generator=generator(0, "plan"))[:SAMPLE]
        examples = task.encode(rows.train.take(order.tolist()), config.data.train)
    else:
        examples = _longest(limit, here.kind)
        notes.append(f"every row is taken to have {limit} tokens")
    if rows is not None:
        sizes = {client: len(shard) for client, shard in rows.shards.items()}
    else:
        settings = local_settings(config.train)
        size = (settings.steps or 1) * settings.batch_size
        sizes = {f"{number:04d}": size for number in range(config.partition.clients)}
    stack = drawn.base.stack
    cached = bool(config.train.cache) and revisits(config.train, [*sizes.values()])
    skips = cached and stack is not None and stack.lowest > 0
    return Sketch(
        config=config,
        outline=drawn,
        task=task,
        examples=examples,
        sizes=sizes,
        rows=rows,
        dtype=dtype,
        weights=weights,
        skips=skips,
        notes=tuple(notes),
    )


def _rows(here: Experiment) -> tuple[Rows | None, list[str]]:
    """The rows, if all sources are on this machine; what to say if not."""
    try:
        return here.rows, []
    except NotHere as missing:
        clients = here.config.partition.clients
        said = f"{missing.source} is not on this machine: {clients} clients are "
        return None, [f"{said}assumed (partition.clients)"]


def _outline(
    config: RunConfig, head: Head, labels: Sequence[Label], notes: list[str]
) -> tuple[Outline, str, int]:
    """The model in outline, its dtype by name, and the bytes of its weights in memory."""
    wanted = config.model.dtype

    def of(dtype: torch.dtype) -> Outline:
        return outline(
            config.model.path,
            head,
            lora_settings(config.lora),
            root=config.root,
            labels=labels,
            dtype=dtype,
            offline=config.offline,
        )

    dtype = base_dtype(wanted, config.device)
    drawn, half = of(dtype), dtype == torch.bfloat16
    if wanted == "auto" and config.device == "cpu":
        half = is_wide(drawn.base) and bf16_speed() >= WORTH
        drawn = of(torch.bfloat16) if half else drawn
    if wanted == "auto":
        wanted = "bf16" if half else "fp32"
        notes.append(f"model.dtype = 'auto' is taken to be {wanted}")
    base = drawn.base
    if base.stack is not None:
        base.stack.checkpointing = config.train.recompute
    tensors = [*base.model.parameters(), *base.model.buffers()]
    weights = sum(t.numel() * t.dtype.itemsize for t in tensors)
    if wanted in ("int8", "nf4"):
        weights -= _saved_by_quantising(base.model, 1.0 if wanted == "int8" else 0.5)
    return drawn, wanted, weights


def _saved_by_quantising(model: Any, width: float) -> int:
    """Bytes that linear layers below the head no longer take at ``width`` bytes per element."""
    encoder = model.get_submodule(model.base_model_prefix)
    linears = [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
    return round(sum(w.numel() * (w.dtype.itemsize - width) for w in linears))


def _longest(length: int, kind: TaskKind) -> Examples:
    """One row as long as can be, of which all tokens are trained on."""
    per_row, per_token = torch.zeros(1).long(), torch.ones(length, dtype=torch.uint8)
    targets = per_row if kind.labelled else per_token
    tokens = torch.full((length,), 2, dtype=torch.int32)
    return Examples(tokens, torch.tensor([0, length]), targets)
