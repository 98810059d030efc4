"""A first run of a loaded model: which of its layers see rows one after another.

The bank gives each vector that enters a layer to a client by its place. That is right for a layer
whose inputs for three rows are those for each row alone, end to end, however often it is called and
whatever their shape. It is wrong for relative positions (DeBERTa), for rows on the second axis
(XLNet), and for tokens that were sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rolora.errors import ConfigError, one_line

NEVER = "is never called"
OWN_VECTORS = "is also called with vectors that belong to no row, such as relative positions"
ROWS, LENGTH = 3, 5


def unfit(model: Any, paths: Sequence[str], *, outline: bool = False) -> dict[str, str]:
    """Those of the layers at ``paths`` that cannot carry per-client parts, each with the reason.

    Of an ``outline``, whose tensors have no values, the numbers of vectors are compared alone.
    Raises ConfigError if the model cannot run.
    """
    ids = tokens(model.config, ROWS, LENGTH)
    whole = _inputs(model, paths, ids, outline)
    single = [_inputs(model, paths, row, outline) for row in ids.unsqueeze(1)]
    rough = model.dtype.itemsize < 4 or getattr(model, "is_quantized", False)
    found = {}
    for path in paths:
        if why := _fault(whole[path], [alone[path] for alone in single], 5e-2 if rough else 1e-4):
            found[path] = why
    return found


def tokens(config: Any, rows: int, length: int) -> Tensor:
    """Token ids (rows, length) of a model's vocabulary, all different if that is large enough."""
    most = max(int(getattr(config, "vocab_size", None) or 100) - 10, 1)
    return torch.arange(rows * length).view(rows, length) % most + min(10, most - 1)


def _inputs(
    model: Any, paths: Sequence[str], ids: Tensor, outline: bool
) -> dict[str, list[Tensor | int]]:
    """What each layer is called with: a number for each vector, or in an outline how many."""
    calls: dict[str, list[Tensor | int]] = {path: [] for path in paths}

    def note(path: str, x: Tensor) -> None:
        count = x.numel() // x.shape[-1]
        if outline:
            calls[path].append(count)
        else:
            weights = torch.arange(x.shape[-1], device=x.device).float().cos()
            calls[path].append(x.reshape(count, -1).float() @ weights)

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, path=path: note(path, inputs[0])
        )
        for path in paths
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"a {type(model).__name__} cannot run a few tokens: {one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _fault(
    whole: Sequence[Tensor | int], single: Sequence[Sequence[Tensor | int]], tolerance: float
) -> str:
    if not whole:
        return NEVER
    if {len(calls) for calls in single} != {len(whole)}:
        return "is called more or less often depending on the rows"
    for together, *alone in zip(whole, *single, strict=True):
        if not isinstance(together, Tensor):
            if together != sum(alone):
                return OWN_VECTORS
            continue
        joined = torch.cat(alone)
        if len(together) != len(joined):
            return OWN_VECTORS
        # most vectors, not all: rounding may send a token of a mixture to another expert
        if not (together - joined).abs().median() <= tolerance * joined.abs().max():
            return "does not see its rows one after another"
    return ""
