"""The client bank: K clients' factors stacked on one frozen base model.

Rows lie client after client; the frozen weights see one large matrix product and only the low-rank
part is per client::

    y = (W0 + D) x + scaling · B_k C_k (A_k x)     x (..., in)   A (K, rank, in)   B (K, out, rank)

D (out, in), a change of the base weight that all clients share, and C (K, heads, r, r), a core
between the factors, are there for methods that have them.

The loss is summed over clients, so client k's gradient is exactly what it would be alone. K = 1 is
a plain client.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rolora.algorithm.adapter import AdapterState, Roles, Specs, TensorSpec, role_of, through_core
from rolora.data.examples import moved
from rolora.errors import ConfigError
from rolora.model.segments import add_low_rank, segment_linear

PREFIX = "base_model.model."


class Bank:
    """Stacked leaves of K clients, read by the layers that ``attach`` put into a model.

    ``leaves`` maps each adapter tensor's name to a (K, *shape) leaf; smaller ranks are filled up
    with zeros, which stay zero. ``deltas`` maps the names of what all clients share to (out, in).
    With no leaves loaded the model is the plain base. ``rows`` and, in a packed batch, ``tokens``
    are how many each client has; left empty, all have as many. ``dropout`` is LoRA's input dropout,
    active only while ``noise`` says which random stream a row draws from. ``most`` is how many
    clients fitted in memory, once more did not. ``layers`` maps names of layers to their frozen
    modules.
    """

    def __init__(self, specs: Specs, dropout: float, layers: Mapping[str, nn.Module]) -> None:
        self.specs = specs
        self.dropout = dropout
        self.layers = layers
        self.leaves: dict[str, Tensor] = {}
        self.deltas: dict[str, Tensor] = {}
        self.adapters: Sequence[AdapterState] = ()
        self.rows: tuple[int, ...] = ()
        self.tokens: tuple[int, ...] = ()
        self.noise: Noise | None = None
        self.most: int | None = None

    @property
    def clients(self) -> int:
        """How many clients are loaded."""
        return next(iter(self.leaves.values())).shape[0] if self.leaves else 0

    def load(self, adapters: Sequence[AdapterState]) -> None:
        """Stack these clients' adapters, which hold the same names; deltas must be the same too.

        A tensor goes where its layer is.
        """
        first, self.adapters = adapters[0], adapters
        for name in first.only(frozenset({"delta"})):
            if not all(first.holds(name, other[name]) for other in adapters):
                raise ValueError(f"clients of one bank have different {name}")
            self.deltas[name] = first[name].to(self._device(name))
        self.leaves = {
            name: _stacked([adapter[name] for adapter in adapters]).to(self._device(name))
            for name in first
            if name not in self.deltas
        }

    def _device(self, name: str) -> torch.device:
        """Where the layer is to which the tensor of this name belongs."""
        layer = name.rpartition(".lora_")[0] or name.rpartition(".")[0]
        return next(self.layers[layer].parameters()).device

    def unload(self) -> None:
        """Leave the plain base model."""
        self.leaves, self.deltas, self.adapters = {}, {}, ()
        self.rows, self.tokens, self.noise = (), (), None

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """An empty bank while this lasts; afterwards it holds what it held before."""
        names = ("leaves", "deltas", "adapters", "rows", "tokens", "noise")
        before = {name: getattr(self, name) for name in names}
        self.unload()
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def take(self, client: int) -> AdapterState:
        """A copy, on the CPU, of what the client at this position holds."""
        return self.adapters[client] | {
            name: part.detach().to("cpu", copy=True) for name, part in self.view(client).items()
        }

    def view(self, client: int) -> dict[str, Tensor]:
        """What the client at this position holds, as parts of the leaves."""
        start = self.adapters[client]
        return {name: leaf[client][_inside(start[name])] for name, leaf in self.leaves.items()}

    def up(self, layer: str) -> Tensor:
        """(K, out, rank): the clients' lora_B, times their cores where they have some."""
        lora_b, core = self.leaves[f"{layer}.lora_B.weight"], f"{layer}.lora_core.weight"
        if core not in self.leaves:
            return lora_b
        return through_core(lora_b, self.leaves[core], self.leaves.get(f"{layer}.lora_gain.weight"))

    def train(self, roles: Roles) -> list[Tensor]:
        """Have the leaves of these roles collect gradients, and no others; returns them."""
        for name, leaf in self.leaves.items():
            leaf.requires_grad_(role_of(name) in roles)
            leaf.grad = None
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    def keep(self, clients: int) -> None:
        """Drop all but the first ``clients``: those that have taken their last step leave.

        The others stay where they are in memory.
        """
        self.leaves = {
            name: leaf.detach()[:clients].requires_grad_(leaf.requires_grad)
            for name, leaf in self.leaves.items()
        }

    def sizes(self, x: Tensor) -> tuple[int, ...]:
        """How many of the vectors in ``x`` (..., width) are each client's."""
        count = x.numel() // x.shape[-1]
        if not self.rows:
            return (count // self.clients,) * self.clients
        if self.tokens and count == sum(self.tokens):
            return self.tokens
        return tuple(count // sum(self.rows) * rows for rows in self.rows)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(K, *shape of the largest); smaller tensors are filled up with zeros."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    shape = [max(widths) for widths in zip(*(tensor.shape for tensor in tensors), strict=True)]
    whole = tensors[0].new_zeros(len(tensors), *shape)
    for place, tensor in zip(whole, tensors, strict=True):
        place[_inside(tensor)] = tensor
    return whole


def _inside(tensor: Tensor) -> tuple[slice, ...]:
    """Where a tensor of this shape lies in one that was filled up."""
    return tuple(slice(width) for width in tensor.shape)


class LoraLinear(nn.Module):
    """A frozen linear layer, called as a black box, plus each client's low-rank part."""

    def __init__(self, base: nn.Module, layer: str, scaling: float, bank: Bank) -> None:
        super().__init__()
        self.base = base
        self.layer = layer
        self.scaling = scaling
        self.bank = bank
        self.noise_key = zlib.crc32(layer.encode())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        bank = self.bank
        if not bank.leaves:
            return y
        lora_a = bank.leaves[f"{self.layer}.lora_A.weight"]  # (K, rank, in)
        delta = bank.deltas.get(f"{self.layer}.lora_delta.weight")
        if delta is not None:
            y = y + functional.linear(x.to(delta.dtype), delta).to(y.dtype)
        if bank.noise is not None and bank.dropout > 0:
            x = x * bank.noise.mask(x, self.noise_key, bank.dropout)
        return add_low_rank(y, x, lora_a, bank.up(self.layer), self.scaling, bank.sizes(x))


class HeadLinear(nn.Module):
    """A linear layer of the task head with one weight (K, out, in) and bias (K, out) per client."""

    def __init__(self, base: nn.Linear, layer: str, bank: Bank) -> None:
        super().__init__()
        self.base = base
        self.layer = layer
        self.bank = bank

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank
        if not bank.leaves:
            plain: Tensor = self.base(x)
            return plain
        sizes = bank.sizes(x)
        y = segment_linear(x, bank.leaves[f"{self.layer}.weight"], sizes)
        if self.base.bias is None:
            return y
        return y + _each(bank.leaves[f"{self.layer}.bias"], sizes, y)


class HeadNorm(nn.Module):
    """A LayerNorm of the task head with one weight and bias (K, width) per client."""

    def __init__(self, base: nn.LayerNorm, layer: str, bank: Bank) -> None:
        super().__init__()
        self.base = base
        self.layer = layer
        self.bank = bank

    def forward(self, x: Tensor) -> Tensor:
        bank, base = self.bank, self.base
        if not bank.leaves:
            plain: Tensor = base(x)
            return plain
        sizes = bank.sizes(x)
        y = functional.layer_norm(x, base.normalized_shape, eps=base.eps)
        y = y * _each(bank.leaves[f"{self.layer}.weight"], sizes, y)
        return y if base.bias is None else y + _each(bank.leaves[f"{self.layer}.bias"], sizes, y)


def _each(leaf: Tensor, sizes: Sequence[int], like: Tensor) -> Tensor:
    """A (K, width) leaf with each client's vector once for each of its rows, shaped as ``like``."""
    each = moved(torch.tensor(sizes), leaf.device)
    return leaf.repeat_interleave(each, dim=0, output_size=sum(sizes)).view(like.shape)


HEADS: Mapping[type[nn.Module], Any] = {nn.Linear: HeadLinear, nn.LayerNorm: HeadNorm}


def attach(
    model: nn.Module,
    layers: Sequence[str],
    head_layers: Sequence[str],
    *,
    missing: Collection[str] = (),
    head_std: float = 0.02,
    b_std: float = 0.0,
    rank: int,
    scaling: float,
    dropout: float = 0.0,
) -> Bank:
    """Freeze ``model`` and put a bank under these modules (dotted paths), in place.

    ``layers`` get LoRA factors, ``head_layers`` a full copy per client, which starts from the
    present values unless they are ``missing`` from the checkpoint. Returns the empty bank.

    Raises ConfigError for a rank above a layer's narrower side, and for modules of other kinds.

    Two clients with two rows each, in one pass over the frozen model:

    >>> import torch, rolora
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    >>> bank = rolora.attach(model, ["0", "1"], [], rank=2, scaling=1.0)
    >>> adapter = rolora.get_method("fedit").init(bank.specs, torch.Generator().manual_seed(0))
    >>> bank.load([adapter, adapter])
    >>> _ = bank.train(frozenset({"B"}))
    >>> model(torch.ones(4, 3)).square().sum().backward()
    >>> bank.leaves["base_model.model.0.lora_B.weight"].grad.shape  # (clients, out, rank)
    torch.Size([2, 4, 2])

    Clients with different numbers of rows: set ``bank.rows = (3, 1)`` before the pass.
    """
    model.requires_grad_(False)
    tensors: list[TensorSpec] = []
    head: dict[str, Tensor] = {}
    for path in layers:
        width_in, width_out = linear_shape(model.get_submodule(path))
        if rank > (most := min(width_in, width_out)):
            raise ConfigError(
                f"lora.rank = {rank} is more than layer {path!r} can use: it has {width_in} inputs "
                f"and {width_out} outputs, so no change of it has a rank above {most}"
            )
        tensors.append(TensorSpec(f"{PREFIX}{path}.lora_A.weight", "A", (rank, width_in)))
        tensors.append(TensorSpec(f"{PREFIX}{path}.lora_B.weight", "B", (width_out, rank)))
    for path in head_layers:
        module = model.get_submodule(path)
        if type(module) not in HEADS:
            raise ConfigError(
                f"layer {path!r} of the task head is a {type(module).__name__}; only linear layers "
                "and LayerNorms can be trained: use another model"
            )
        for key, value in module.named_parameters():
            name = f"{PREFIX}{path}.{key}"
            if f"{path}.{key}" not in missing:
                head[name] = value.detach().float().cpu().clone()
            elif isinstance(module, nn.LayerNorm):  # never drawn: it starts as the identity
                head[name] = torch.full(value.shape, float(key == "weight"))
            tensors.append(TensorSpec(name, "head", tuple(value.shape)))
    scalings = {PREFIX + path: scaling for path in layers}
    ordered = tuple(sorted(tensors, key=lambda spec: spec.name))
    frozen = {PREFIX + path: model.get_submodule(path) for path in [*layers, *head_layers]}
    bank = Bank(Specs(ordered, scalings, head, head_std, b_std), dropout, frozen)
    for path in layers:
        layer = LoraLinear(model.get_submodule(path), PREFIX + path, scaling, bank)
        model.set_submodule(path, layer)
    for path in head_layers:
        module = model.get_submodule(path)
        model.set_submodule(path, HEADS[type(module)](module, PREFIX + path, bank))
    model.eval()
    return bank


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) widths of a linear layer: nn.Linear, GPT-2's Conv1D, or a quantised one."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D":
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0], weight.shape[1]
    raise ConfigError(f"a {type(module).__name__} is not a linear layer and cannot carry LoRA")


@dataclass(frozen=True)
class Noise:
    """Which random stream every vector of a batch draws its dropout from.

    ``keys`` int64 (rows,); where the batch is packed, ``tokens`` are the row and the position of
    each token (tokens,).
    """

    keys: Tensor
    tokens: tuple[Tensor, Tensor] | None = None

    def mask(self, x: Tensor, layer_key: int, rate: float) -> Tensor:
        """A dropout mask for ``x`` (..., width), whose vectors are row after row; times 1/(1−rate).

        An element depends on its row's key, the layer and its own place alone: not on the padding,
        nor on which other clients share the pass. A layer that is called several times (ALBERT)
        has the same mask each time. The hash is splitmix64's finaliser (Steele et al. 2014) on
        wrapping int64.
        """
        width, keys = x.shape[-1], self.keys.to(x.device)
        if self.tokens is not None and x.numel() == len(self.tokens[0]) * width:
            row, position = (part.to(x.device) for part in self.tokens)
            keys = keys[row].view(-1, 1)
            places = position.view(-1, 1) * width + torch.arange(width, device=x.device)
        else:
            keys = keys.view(-1, 1)
            places = torch.arange(x.numel() // len(keys), device=x.device)
        z = (keys ^ _signed(layer_key * _ODD)) + places * _ODD
        z = (z ^ ((z >> 30) & 0x3_FFFF_FFFF)) * _MIX1
        z = (z ^ ((z >> 27) & 0x1F_FFFF_FFFF)) * _MIX2
        uniform = ((z >> 31) & 0xFF_FFFF).to(torch.float32) / float(1 << 24)
        return (uniform >= rate).to(x.dtype).view(x.shape) / (1.0 - rate)


def _signed(value: int) -> int:
    """The low 64 bits of ``value`` as the int64 that holds them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_ODD = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def row_keys(client_seeds: Sequence[int], step: int, rows: Sequence[int]) -> Tensor:
    """One key (int64) per row, client after client, from (client's round seed, step, its row)."""
    seeds = torch.tensor([_signed(seed) for seed in client_seeds])
    each = torch.tensor(rows)
    starts = (each.cumsum(0) - each).repeat_interleave(each)
    index = torch.arange(len(starts)) - starts + (step << 20) + 1
    mixed = (seeds.repeat_interleave(each) + index * _ODD) * _MIX1
    return mixed ^ ((mixed >> 29) & 0x7_FFFF_FFFF)
