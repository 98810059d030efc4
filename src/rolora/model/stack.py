"""The model's layers on packed tokens: no work on padding, and none below the adapters.

A batch enters and leaves the model as padded rows (rows, width). Between its first and its last
layer the real tokens lie end to end, (1, tokens, hidden), and only attention sees where rows begin
and end. What enters the lowest layer with an adapter can be computed once, kept, and put in there.
Where the head reads each row's first token alone, the last layer computes no other one after its
keys and values.

Layers may be on several GPUs: what enters a layer is copied to its GPU, and what leaves the last
one to the first layer's, where everything outside the layers is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from rolora.model.packing import Packing, Place, pack, packed_attention
from rolora.model.probe import tokens

ATTENTION = "rolora_packed"
WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size")


class _Reached(Exception):
    """The layers below the adapters have run: the rest of the model is not wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Stack:
    """A model's layers, taken over so that they can run on packed tokens.

    ``lowest`` is the first layer with an adapter. ``checkpointing`` recomputes each layer in the
    backward pass instead of keeping its activations. ``first``: of what leaves the last layer, a
    row's first token alone is read.
    """

    def __init__(self, layers: nn.ModuleList, lowest: int, window: int | None) -> None:
        self.layers = layers
        self.depth: int = len(layers)
        self.lowest = lowest
        self.window = window
        self.checkpointing = False
        self.first = False
        self._packing: Packing | None = None
        self._prefix: Tensor | None = None
        self._first = 0
        self._capture = False
        self._narrow: Packing | None = None
        self._seen: dict[Any, tuple[Any, Any]] = {}  # values that layers share, and their copies
        for index, layer in enumerate(layers):
            layer.forward = partial(self._layer, index, layer.forward)
        for module in layers[-1].modules():
            module.register_forward_pre_hook(self._narrowed, with_kwargs=True)

    @property
    def devices(self) -> set[torch.device]:
        """Those that the layers are on."""
        return {self._device(index) for index in range(self.depth)}

    def fits(self, lengths: Tensor) -> bool:
        """Whether rows of these lengths lie within the model's attention window."""
        return self.window is None or int(lengths.max()) <= self.window

    @contextlib.contextmanager
    def packed(self, lengths: Tensor, prefix: Tensor | None = None) -> Iterator[Packing | None]:
        """Run what follows packed, for rows of these lengths; yields the packing.

        Yields None and changes nothing where a row is longer than the model's attention window.
        ``prefix`` (tokens, hidden) replaces the layers below ``lowest``.
        """
        if not self.fits(lengths):
            yield None
            return
        self._packing, self._prefix = pack(lengths).to(self._device(0)), prefix
        self._first = 0 if prefix is None else self.lowest
        try:
            yield self._packing
        finally:
            self._packing, self._prefix, self._first = None, None, 0
            self._seen.clear()

    def below(self, model: Any, inputs: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        """What enters layer ``lowest`` for these rows: (tokens, hidden), packed."""
        self._capture = True
        try:
            with torch.no_grad(), self.packed(lengths):
                model.base_model(**inputs)
        except _Reached as reached:
            return reached.hidden.squeeze(0)
        finally:
            self._capture = False
        raise RuntimeError("the model did not run its layers in order")

    def _layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        packing, device = self._packing, self._device(index)
        hidden, *rest = args
        if packing is not None:
            if index < self._first:
                return hidden
            if index == self._first:
                below = self._prefix
                hidden = _packed(hidden, packing) if below is None else below.unsqueeze(0)
            if self._capture and index == self.lowest:
                raise _Reached(hidden)
            rest = [self._along(value, packing) for value in rest]
            kwargs = {key: self._along(value, packing) for key, value in kwargs.items()}
            if self.first and index == self.depth - 1:
                packing = replace(packing, first=True)
                forward = partial(self._narrowing, forward)
            kwargs["packing"] = packing
        rest = [self._copied(value, device) for value in rest]
        kwargs = {key: self._copied(value, device) for key, value in kwargs.items()}
        run, hidden = partial(forward, **kwargs), hidden.to(device)
        if self.checkpointing and torch.is_grad_enabled():
            out = checkpoint(run, hidden, *rest, use_reentrant=False)
        else:
            out = run(hidden, *rest)
        if index < self.depth - 1:
            return out
        self._seen.clear()
        out = out.to(self._device(0))
        return out if packing is None else _unpacked(out.squeeze(0), packing)

    def _device(self, index: int) -> torch.device:
        """Where this layer computes."""
        return next(self.layers[index].parameters()).device

    def _copied(self, value: Any, device: torch.device) -> Any:
        """A layer's other argument on this device, copied there once a pass."""
        if isinstance(value, tuple):
            return tuple(self._copied(item, device) for item in value)
        if not isinstance(value, Tensor | Packing):
            return value
        key = id(value), device
        if key not in self._seen:
            self._seen[key] = value, value.to(device)
        return self._seen[key][1]

    def _narrowing(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The last layer, also where it is recomputed in the backward pass."""
        self._narrow = kwargs["packing"]
        try:
            return forward(*args, **kwargs)
        finally:
            self._narrow = None

    def _narrowed(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module of the last layer is called with, if it adds what entered the layer to what
        attention gave: first tokens alone."""
        packing = self._narrow
        if packing is None:
            return None

        def whole(x: Any) -> bool:
            return isinstance(x, Tensor) and x.shape[:2] == (1, len(packing.row))

        def narrow(x: Any) -> Any:
            return x.index_select(1, packing.firsts) if whole(x) else x

        if sum(map(whole, (*args, *kwargs.values()))) < 2:
            return None
        return tuple(map(narrow, args)), {key: narrow(x) for key, x in kwargs.items()}

    def _along(self, value: Any, packing: Packing) -> Any:
        """A layer's other argument, packed where it has an entry per token; no mask is left."""
        if isinstance(value, tuple):
            return tuple(self._along(item, packing) for item in value)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 4:
            return None
        rows = packing.rows
        if value.dim() < 2 or value.shape[0] not in (1, rows) or value.shape[1] != packing.width:
            return value
        if id(value) not in self._seen:
            packed = _packed(value.expand(rows, *value.shape[1:]), packing)
            self._seen[id(value)] = (value, packed)
        return self._seen[id(value)][1]


def _packed(padded: Tensor, packing: Packing) -> Tensor:
    """Padded rows (rows, width, ...) as tokens end to end (1, tokens, ...)."""
    flat = padded.flatten(0, 1)
    return (flat if packing.dense else flat.index_select(0, packing.places)).unsqueeze(0)


def _unpacked(tokens: Tensor, packing: Packing) -> Tensor:
    """Tokens end to end (tokens, ...) as padded rows (rows, width, ...), zero on padding.

    Tokens that were not computed are NaN: whatever reads them is told.
    """
    size = packing.rows * packing.width
    if packing.first:
        places = packing.places[packing.firsts]
        tokens = Place.apply(tokens, places, size, torch.nan)  # type: ignore[no-untyped-call]
    elif not packing.dense:
        tokens = Place.apply(tokens, packing.places, size)  # type: ignore[no-untyped-call]
    return tokens.view(packing.rows, packing.width, *tokens.shape[1:])


def layers_of(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The path of the list of a model's layers, and the list; None if there is no such list."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    return found[0] if len(found) == 1 else None


def device_map(model: Any, devices: Sequence[Any], share: float = 1.0) -> dict[str, Any] | None:
    """Module -> its device, as transformers takes it: layers in their order, each device with
    about as many weights, and everything outside them on the first one, where layer 0 is, too.

    ``share``: bytes of a layer's weight, by those of a weight outside. None without ``layers_of``.
    """
    if (found := layers_of(model)) is None:
        return None
    layers = found[1]
    sizes = [share * sum(p.numel() for p in layer.parameters()) for layer in layers]
    used = sum(p.numel() for p in model.parameters()) - sum(sizes) / share
    total, where = used + sum(sizes), dict[str, Any]()

    def put(module: nn.Module, path: str) -> None:
        """Everything below ``path`` on the first device, but for the layers."""
        tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        where.update({path + name: devices[0] for name, _ in tensors})
        for name, child in module.named_children():
            if any(part is layers for part in child.modules()):
                put(child, f"{path}{name}.")
            elif module is not layers:
                where[path + name] = devices[0]

    put(model, "")
    for index, size in enumerate(sizes):
        place = int(len(devices) * (used + size / 2) / total) if index else 0
        where[f"{found[0]}.{index}"], used = devices[place], used + size
    return where


def take_over(model: Any, adapted: Callable[[str], bool], *, trusted: bool = False) -> Stack | None:
    """The model's layers as a :class:`Stack`, or None for a model that they do not suit.

    ``adapted`` tells by its path whether a module carries an adapter. Three rows of unequal length
    are run both ways: a model whose layers mix tokens other than by transformers' attention
    interface gives other numbers when packed, and is left as it was. A ``trusted`` one is not run.
    A model that accelerate's hooks run on several devices is run without them from then on.
    """
    found = layers_of(model)
    if found is None or not getattr(model, "_supports_attention_backend", False):
        return None
    path, layers = found
    lowest = next(
        (
            i
            for i, layer in enumerate(layers)
            if any(adapted(f"{path}.{i}.{name}") for name, _ in layer.named_modules())
        ),
        len(layers) - 1,
    )
    windows = [size for name in WINDOWS if (size := getattr(model.config, name, None))]
    before = model.config._attn_implementation
    plain = None if trusted else _hidden(model)
    # here, since a worker process that imports it before transformers does was seen to hang
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    originals = [layer.forward for layer in layers]
    transformers.AttentionInterface.register(ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    stack = Stack(layers, lowest, min(windows) // 2 if windows else None)
    model.set_attn_implementation(ATTENTION)
    if plain is None or _agrees(model, stack, plain):
        stack.first = plain is not None and _reads_first(model, stack, plain)
        return stack
    model.set_attn_implementation(before)
    for layer, forward in zip(layers, originals, strict=True):
        layer.forward = forward
    return None


LENGTHS = (7, 2, 4)  # of the rows that are run both ways


def _rows(model: Any) -> tuple[Tensor, Tensor]:
    """Token ids (3, 7) and which of them are real."""
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    ids = tokens(model.config, *real.shape)
    return torch.where(real, ids, model.config.pad_token_id or 0), real


def _hidden(model: Any) -> Tensor:
    """What leaves the model's last layer for these rows, with its own attention."""
    ids, real = _rows(model)
    with torch.no_grad():
        out = model.base_model(input_ids=ids, attention_mask=real.long())
    hidden: Tensor = out.last_hidden_state.to(real.device)[real]
    return hidden


def _agrees(model: Any, stack: Stack, plain: Tensor) -> bool:
    """Whether packing gives the same; False also where the model cannot run with our attention."""
    (ids, real), lengths = _rows(model), torch.tensor(LENGTHS)
    try:
        with torch.no_grad():
            prefix = stack.below(model, {"input_ids": ids}, lengths)
            padded = model.base_model(input_ids=ids, attention_mask=real.long())
            found = [padded.last_hidden_state[real]]
            for given in (None, prefix):
                with stack.packed(lengths, given):
                    found.append(model.base_model(input_ids=ids).last_hidden_state[real])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return False
    return all(_close(x, plain) for x in found)


def _reads_first(model: Any, stack: Stack, plain: Tensor) -> bool:
    """Whether the model's outputs come from each row's first token alone, and its last layer can
    do without the others. They are NaN then, which would reach whatever reads them."""
    ids, _ = _rows(model)
    lengths = torch.tensor(LENGTHS)
    firsts = lengths.cumsum(0) - lengths
    stack.first = True
    try:
        with torch.no_grad(), stack.packed(lengths):
            hidden = model.base_model(input_ids=ids).last_hidden_state[:, 0]
            outputs = model(input_ids=ids).logits
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return False
    finally:
        stack.first = False
    return bool(outputs.isfinite().all()) and _close(hidden, plain[firsts])


def _close(x: Tensor, plain: Tensor) -> bool:
    tolerance = 5e-2 if plain.dtype.itemsize < 4 else 1e-4
    return bool((x - plain).abs().max() <= tolerance * plain.abs().max())
