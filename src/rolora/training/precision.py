"""float32 or bfloat16 for the frozen base: which is faster here, and whether the loss agrees."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rolora.algorithm.adapter import AdapterState
from rolora.data.examples import Examples
from rolora.model.base import Base
from rolora.tasks.registry import Task
from rolora.training.local import evaluate

WORTH = 1.2  # times as fast, at least, for bfloat16 to be taken
WIDE = 256  # hidden size from which products, and not calls, take the time
AGREEMENT = 0.01  # of the loss, at most, that it may differ by


def is_wide(base: Base) -> bool:
    """Whether the model's products are large enough for their dtype to matter."""
    return int(base.model.config.hidden_size) >= WIDE  # type: ignore[union-attr, arg-type]


def bf16_speed(rows: int = 128, width: int = 1024) -> float:
    """How many times as fast as in float32 a (rows, width) × (width, 4 width) product is here."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - started)
        return best

    with torch.inference_mode():
        return seconds(torch.float32) / seconds(torch.bfloat16)


def lowered(
    base: Base,
    task: Task,
    examples: Examples,
    adapter: AdapterState,
    again: Callable[[], Base],
    speed: Callable[[], float] = bf16_speed,
) -> tuple[Base, str]:
    """The base in bfloat16 if that is faster on this CPU and its loss agrees; what to say of it.

    ``examples``: some rows of an ``encode_test``. Where the loss does not agree the base comes
    from ``again()``, since rounding cannot be taken back. Adapters stay float32 either way.
    """
    gain = speed()
    if gain < WORTH:
        return base, f"the base runs in float32: bfloat16 is {gain:.2f} times as fast here"
    before = evaluate(base, task, examples, adapter)["loss"]
    for parameter in base.model.parameters():  # buffers, such as rotary frequencies, stay
        parameter.data = parameter.data.to(torch.bfloat16)
    after = evaluate(base, task, examples, adapter)["loss"]
    seen = f"loss {after:.4f} for {before:.4f} in float32 on {len(examples)} rows"
    if abs(after - before) <= AGREEMENT * abs(before):
        return base, f"the base runs in bfloat16, {gain:.2f} times as fast here: {seen}"
    return again(), f"the base runs in float32: bfloat16 gives another loss ({seen})"
