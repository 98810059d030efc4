"""Cards that are not there: tensors that say they are on CUDA, with values, on a machine without.

Inside ``card()`` everything that is made on or moved to "cuda" or "cuda:1" is such a tensor, on the
first or the second card. An operation on tensors of several devices fails, as on GPUs, and what the
host would have to wait for is counted: values that it reads, sizes that depend on values, copies
that are not queued.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
# torch's own code knows such devices: they have no kernels, so that none is missed here
STAND_IN = "meta"
CPU = torch.device("cpu")
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._linalg_check_errors.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}


class MixedDevices(Exception):
    """One operation was given tensors of several devices."""


class OnCard(Tensor):
    """A tensor of a card; its values are in ``inner``, on the CPU."""

    inner: Tensor  # type: ignore[assignment]
    card: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, card: torch.device) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(STAND_IN, card.index),
        )
        made.inner, made.card = inner, card
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What is asked for, not what stands in for it."""
        return self.card

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """As on a GPU."""
        return True

    def tolist(self) -> Any:
        """As numbers."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Only ever reached outside ``card()``."""
        return Waits().run(func, args, kwargs or {})


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations where their tensors are; ``seen``: what the host waited for, and where."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = [x for x in given if isinstance(x, OnCard)]
        here = [x for x in given if not isinstance(x, OnCard)]
        wanted = kwargs.get("device")
        to = there[0].card if there else CPU
        if wanted is not None:
            to = _card(torch.device(wanted).index) if _stands_in(wanted) else CPU
        if func in COPIES:
            to = args[0].device if func is aten.copy_.default else to
            source = args[1] if func is aten.copy_.default else args[0]
            queued = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            if source.is_cuda != (to != CPU) and not (queued and to != CPU):
                self._wait("a copy from the card" if to == CPU else "a copy to the card")
        elif len({x.card for x in there}) > 1:
            raise MixedDevices(f"{func} of tensors on both cards, {_where()}")
        elif there and func is aten.index.Tensor and isinstance(args[0], OnCard) and here:
            self._wait("indices that are copied to the card")
        elif there and any(x.dim() for x in here):
            raise MixedDevices(f"{func} of tensors on a card and the CPU, {_where()}")
        told = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        if there and not told and (func in READS or _masked(func, args)):
            self._wait(str(func))
        if wanted is not None:
            kwargs = {**kwargs, "device": CPU}
        wrapped = {id(x.inner): x for x in there}
        args, kwargs = tree_map_only(OnCard, lambda x: x.inner, (args, kwargs))
        found = func(*args, **kwargs)
        if to == CPU or func is aten._local_scalar_dense.default:
            return found
        return tree_map_only(
            Tensor, lambda x: wrapped[id(x)] if id(x) in wrapped else OnCard(x, to), found
        )

    def _wait(self, what: str) -> None:
        self.seen.append(f"{what}, {_where()}")


def _masked(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is an index by which of a mask's elements are true."""
    if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return False
    return any(x is not None and x.dtype == torch.bool for x in args[1])


def _where() -> str:
    """The innermost place in rolora, or in the tests, that led here."""
    for frame in reversed(traceback.extract_stack()):
        if "/rolora/" in frame.filename:
            return f"{frame.filename.rpartition('/rolora/')[2]}:{frame.lineno} {frame.line}"
    return "outside rolora"


class _Named(TorchFunctionMode):
    """Has torch see the stand-in where "cuda" is named."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is Tensor.backward:  # which may name it in turn
            with self:
                return _engine_run_backward(
                    args,
                    tuple(map(torch.ones_like, args)),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        args = tuple(_stood_in(x) for x in args)
        kwargs = {name: _stood_in(x) for name, x in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and _stands_in(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])  # with values
        return func(*args, **kwargs)


def _card(index: int | None) -> torch.device:
    return torch.device("cuda", index or 0)


def _stands_in(device: Any) -> bool:
    return device is not None and torch.device(device).type == STAND_IN


def _stood_in(value: Any) -> Any:
    if isinstance(value, str) and value in ("cuda", "cuda:0", "cuda:1"):
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device(STAND_IN, value.index or 0)
    return value


@contextlib.contextmanager
def card() -> Iterator[Waits]:
    """Cards while this lasts; what the host waited for is in the result's ``seen``."""
    waits = Waits()
    # tensors like these cannot be made in inference mode
    with mock.patch.object(torch, "inference_mode", torch.no_grad), waits, _Named():
        yield waits
