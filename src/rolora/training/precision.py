"""float32 or bfloat16 for the frozen base on a CPU: the one in which training steps are shorter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean, median

import torch
from torch import Tensor, nn

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.data.examples import Examples
from rolora.errors import one_line
from rolora.methods import get_method
from rolora.model.base import Base
from rolora.tasks.registry import Task
from rolora.training.local import NonFiniteLoss, Work, train_group
from rolora.training.memory import plan_bank
from rolora.training.settings import LocalSettings

TIE = 1.05  # up to this speed-up float32 stays
WIDE = 256  # hidden size from which products, not calls, take most of the time
AGREEMENT = 0.01  # largest relative difference of the loss
SECONDS = 2.0  # for measuring; one step of each kind at least
EVERYTHING: Roles = frozenset({"A", "B", "head"})


def is_wide(base: Base) -> bool:
    """Whether the model's products are so large that their dtype matters for speed."""
    return int(base.model.config.hidden_size) >= WIDE  # type: ignore[union-attr, arg-type]


def lower(
    base: Base, task: Task, examples: Examples, adapter: AdapterState, batch_size: int, clients: int
) -> str:
    """Cast the base to bfloat16 if steps are shorter so, with the same loss; one line on it.

    A step is that of a bank of the size that a run takes for ``clients`` of these rows, forward and
    backward, in turns in both dtypes. Adapters stay float32 in any case. The base is then as if
    loaded in bfloat16; buffers, such as rotary frequencies, stay.
    """
    if getattr(base.model, "_keep_in_fp32_modules_strict", None):
        return "the base runs in float32, of which this model needs some"
    plan = plan_bank(base, task, examples, adapter, {"": EVERYTHING}, batch_size, clients)
    shards = torch.split(torch.arange(len(examples)), batch_size)[: plan.clients]
    work = [Work(str(i), rows, adapter, steps=1) for i, rows in enumerate(shards)]
    method, settings = get_method("fedit"), LocalSettings(steps=1, batch_size=batch_size)

    def step() -> float:
        trained = train_group(base, task, examples, work, method, settings, lr=0.0, seed=0, round=1)
        return fmean(one.loss for one in trained)

    full = {p: p.data for p in base.model.parameters() if p.is_floating_point()}
    low = {p: data.to(torch.bfloat16) for p, data in full.items()}
    gains, ending = list[float](), time.perf_counter() + SECONDS
    while not gains or time.perf_counter() < ending:
        _hold(full)
        long, before = timed(step)
        _hold(low)
        try:
            short, after = timed(step)
        except (RuntimeError, NonFiniteLoss) as error:  # such as buffers that stay float32
            _hold(full)
            return f"the base runs in float32, since a step in bfloat16 fails: {one_line(error)}"
        gains.append(long / short)
    gain = median(gains[1:] or gains)  # the first steps find nothing in the caches
    faster, agrees = gain > TIE, abs(after - before) <= AGREEMENT * abs(before)
    if faster and agrees:
        head = {name: x.bfloat16().float() for name, x in base.specs.head.items()}
        base.bank.specs = replace(base.specs, head=head)
        base.model.config.dtype = torch.bfloat16
    else:
        _hold(full)
    return (
        f"the base runs in {'bfloat16' if faster and agrees else 'float32'}: a step in bfloat16 is "
        f"{gain:.2f} times as fast here, and its loss is {after:.4f} (in float32 {before:.4f})"
        + ("" if agrees else ", which is too different")
    )


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """The processor's seconds for a step on one thread, and its loss.

    Unlike those of the clock they hardly change beside other work; with several threads they would
    count how long these wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        loss = step()
        return time.process_time() - started, loss
    finally:
        torch.set_num_threads(threads)


def _hold(weights: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, data in weights.items():
        parameter.data = data
