"""float32 or bfloat16 for the frozen base: which is faster here, and does the loss agree."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rolora.algorithm.adapter import AdapterState
from rolora.data.examples import Examples
from rolora.model.base import Base
from rolora.tasks.registry import Task
from rolora.training.local import evaluate

WORTH = 1.2  # least speed-up for which bfloat16 is used
WIDE = 256  # hidden size from which products, not calls, take most of the time
AGREEMENT = 0.01  # largest relative difference of the loss


def is_wide(base: Base) -> bool:
    """Whether the model's products are so large that their dtype matters for speed."""
    return int(base.model.config.hidden_size) >= WIDE  # type: ignore[union-attr, arg-type]


def bf16_speed(rows: int = 128, width: int = 1024) -> float:
    """Speed-up of bfloat16 over float32 for a (rows, width) × (width, 4 · width) product here."""

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
    """The base in bfloat16 if that is faster on this CPU and its loss agrees; a note for the user.

    ``examples``: some rows of an ``encode_test``. If the loss does not agree, the base is loaded
    anew by ``again()``, since rounding cannot be undone. Adapters stay float32 in any case.
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
    return again(), f"the base runs in float32: in bfloat16 the loss differs ({seen})"
