"""What a client sends, as bytes: its values in float32, or its move in fewer bits.

``fp32`` sends the values themselves. The other formats send the *move*, trained − received (client
and server both hold the latter), because moves are small and of similar size where values are not,
plus the *residual*: what rounding kept back of the client's last upload of the same tensor (error
feedback: Seide et al., Interspeech 2014, 1-bit SGD; Karimireddy et al., ICML 2019,
arXiv:1901.09847). So what is rounded away arrives late, but is not lost. Rounding is to nearest,
not random.

====== ======================== =============================== ================
format code of one element      scale                           bytes an element
====== ======================== =============================== ================
fp32   float32                  none                            4
bf16   bfloat16                 none                            2
int8   −127 … 127               one bfloat16 per 128 elements   1.016
int4   −7 … 7, two to a byte    one bfloat16 per 32 elements    0.563
====== ======================== =============================== ================

**A residual that waits.** RoLoRA sends a tensor every other round, and with partial participation
much less often; meanwhile the other factor moves. The residual e of lora_B is added unchanged when
this client next sends lora_B. That is right in the space that is averaged: without rounding the
server's lora_B would have contained e all along, so its product with *today's* lora_A would contain
e · A_today, which is what adding e restores (e · A_then would restore a product that no longer
exists). What cannot be undone is that others trained with a lora_B without e. A residual does not
grow while it waits: it is at most half a quantisation step of the last upload, and each tensor has
its own, so lora_A, lora_B and the head never mix.

**Sparse.** For a method that sends few directions, a rank-one piece (a row of lora_A, a column of
lora_B, or a whole head tensor) travels only if it differs from what was received. One bit per
piece, before the codes, says which travel. The residual of a piece that does not travel is kept.

A payload is one safetensors file with one tensor of bytes. The tensor's name holds the format and a
digest of names and shapes. The receiver knows those already (the method and the round determine
what travels), so they are compared instead of sent, which would cost more than the codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from rolora.algorithm.adapter import role_of
from rolora.errors import RoloraError

Format = Literal["fp32", "bf16", "int8", "int4"]
Tensors = Mapping[str, Tensor]


class WireError(RoloraError):
    """A tensor that cannot be encoded, or a payload that cannot be decoded."""


class _Blocks(NamedTuple):
    """How many elements share a scale, and the largest code."""

    size: int
    largest: int


_BLOCKS = {"int8": _Blocks(128, 127), "int4": _Blocks(32, 7)}


def num_bytes(format: Format, like: Tensors, moved: Tensors | None = None) -> int:
    """Bytes of codes and scales for tensors of these shapes, without the file's header.

    ``moved``, for a sparse payload: name -> which pieces travel (bool); their bits count too.
    """
    if moved is None:
        return sum(_size(format, tensor.numel()) for tensor in like.values())
    bits = sum(-(-len(chosen) // 8) for chosen in moved.values())
    return bits + sum(_size(format, _pieces(n, t)[moved[n]].numel()) for n, t in like.items())


def body_bytes(payload: bytes) -> int:
    """Bytes of a payload after its header: what ``num_bytes`` counts."""
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


def encode(
    format: Format,
    trained: Tensors,
    received: Tensors,
    residual: Tensors,
    *,
    sparse: bool = False,
) -> tuple[bytes, dict[str, Tensor]]:
    """The payload for ``trained``, and the residual to keep for these tensors' next upload.

    ``trained`` and ``received`` are float32 and have the same names and shapes; ``residual`` holds
    what the last uploads kept back. Raises WireError naming a tensor that is not finite.
    """
    names = sorted(_float32(received))
    moved = {n: _moved(n, trained[n], received[n]) for n in names} if sparse else None
    parts, kept = [torch.empty(0, dtype=torch.uint8)], {}
    if moved is not None:
        parts += [_bits(chosen) for chosen in moved.values()]
    for name in names:
        values = trained[name].detach()
        wanted = values if format == "fp32" else values - received[name]
        if format != "fp32" and name in residual:
            wanted = wanted + residual[name]
        _check_finite(name, wanted)
        travels = wanted if moved is None else _pieces(name, wanted)[moved[name]]
        packed = _pack(format, travels.reshape(-1).contiguous())
        if format != "fp32":
            arrives = _placed(name, _unpack(format, name, packed, travels.numel()), wanted, moved)
            _check_finite(name, received[name] + arrives)
            kept[name] = wanted - arrives
        parts.append(packed)
    body = torch.cat(parts)
    return save({_title(format, received, sparse): body}), kept


def decode(
    format: Format, payload: bytes, received: Tensors, *, sparse: bool = False
) -> dict[str, Tensor]:
    """The values in a payload, float32; ``received`` is what the sender started from.

    A payload is not trusted: its length and header must be, byte for byte, those of the only file
    that fits, so no header is parsed. Raises WireError otherwise, and for scales or values that are
    not finite.
    """
    moved = _travelling(payload, _float32(received)) if sparse else None
    size = num_bytes(format, _float32(received), moved)
    header = _header(format, received, size, sparse)
    if len(payload) != len(header) + size:
        raise WireError(
            f"the payload has {len(payload)} bytes, expected {len(header) + size} for "
            f"{len(received)} tensors as {format}"
        )
    if not payload.startswith(header):
        raise WireError(
            f"the payload's header is not that of these {len(received)} tensors as {format}: "
            "other names, shapes or another format"
        )
    body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)[len(header) :]
    values, at = {}, sum(-(-len(chosen) // 8) for chosen in (moved or {}).values())
    for name in sorted(received):
        like = received[name]
        count = like.numel() if moved is None else _pieces(name, like)[moved[name]].numel()
        end = at + _size(format, count)
        arrived = _unpack(format, name, body[at:end].clone(), count)
        if format == "fp32":
            values[name] = _placed(name, arrived, like, moved, over=like)
        else:
            values[name] = like + _placed(name, arrived, like, moved)
        _check_finite(name, values[name])
        at = end
    return values


def _pieces(name: str, tensor: Tensor) -> Tensor:
    """(pieces, width), a view: the rows of lora_A, the columns of lora_B; else one piece."""
    if role_of(name) in ("A", "B"):
        return tensor if role_of(name) == "A" else tensor.mT
    return tensor.reshape(1, -1)


def _moved(name: str, values: Tensor, received: Tensor) -> Tensor:
    """Which pieces differ from what was received, bool."""
    return (_pieces(name, values) != _pieces(name, received)).any(dim=1)


def _placed(
    name: str, flat: Tensor, like: Tensor, moved: Tensors | None, over: Tensor | None = None
) -> Tensor:
    """What arrived, in its place; elsewhere ``over``, or else 0."""
    if moved is None:
        return flat.view_as(like)
    whole = torch.zeros(like.shape)
    if over is not None:
        whole.copy_(over)
    rows = _pieces(name, whole)
    rows[moved[name]] = flat.view(-1, rows.shape[1])
    return whole


def _bits(chosen: Tensor) -> Tensor:
    """bool (n,) -> uint8, eight to a byte, the first in its lowest bit."""
    eights = torch.nn.functional.pad(chosen.to(torch.uint8), (0, -len(chosen) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)


def _travelling(payload: bytes, received: Tensors) -> dict[str, Tensor]:
    """Which pieces a sparse payload says travel; none if the payload is too short."""
    counts = {name: len(_pieces(name, received[name])) for name in sorted(received)}
    at, moved = len(payload) - body_bytes(payload), {}
    for name, count in counts.items():
        end = at + -(-count // 8)
        eights = torch.tensor([*payload[at:end].ljust(end - at, b"\0")], dtype=torch.uint8)[:, None]
        moved[name] = (eights >> torch.arange(8, dtype=torch.uint8) & 1).view(-1)[:count].bool()
        at = end
    return moved


def _title(format: Format, like: Tensors, sparse: bool) -> str:
    layout = "".join(f"{name} {tuple(like[name].shape)}\n" for name in sorted(like))
    kind = f"{format}-sparse" if sparse else format
    return f"{kind}-{hashlib.sha256(layout.encode()).hexdigest()[:8]}"


def _header(format: Format, like: Tensors, size: int, sparse: bool) -> bytes:
    """All bytes before the first code, as safetensors writes them."""
    blob = save({_title(format, like, sparse): torch.zeros(size, dtype=torch.uint8)})
    return blob[: len(blob) - size]


def _size(format: Format, numel: int) -> int:
    """Bytes of the codes and scales of this many elements."""
    return _codes(format, numel) + _scales(format, numel)


def _codes(format: Format, numel: int) -> int:
    """Bytes of the codes of this many elements."""
    return {"fp32": 4 * numel, "bf16": 2 * numel, "int8": numel, "int4": -(-numel // 2)}[format]


def _scales(format: Format, numel: int) -> int:
    """Bytes of the scales of this many elements."""
    return 2 * -(-numel // _BLOCKS[format].size) if format in _BLOCKS else 0


def _pack(format: Format, flat: Tensor) -> Tensor:
    """float32 (n,) -> uint8: codes, then scales."""
    if format == "fp32":
        return flat.view(torch.uint8)
    if format == "bf16":
        return flat.to(torch.bfloat16).view(torch.uint8)
    size, largest = _BLOCKS[format]
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    scales = _rounded_up(blocks.abs().amax(dim=1).double() / largest)
    steps = torch.where(scales > 0, scales.float(), 1.0)
    codes = (blocks / steps[:, None]).round().to(torch.int8).view(-1)[: len(flat)]
    if format == "int4":
        nibbles = (torch.nn.functional.pad(codes, (0, len(codes) % 2)) + 8).view(torch.uint8)
        codes = nibbles[::2] | nibbles[1::2] << 4
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)])


def _unpack(format: Format, name: str, packed: Tensor, numel: int) -> Tensor:
    """uint8 as ``_pack`` made it -> float32 (n,). A code times its scale is exact in float32."""
    if format == "fp32":
        return packed.view(torch.float32)
    if format == "bf16":
        return packed.view(torch.bfloat16).float()
    codes = packed[: _codes(format, numel)]
    steps = packed[len(codes) :].clone().view(torch.bfloat16).float()
    if not (torch.isfinite(steps) & (steps >= 0)).all():
        raise WireError(f"{name} has a scale that is not finite or is negative")
    if format == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=1).view(-1)[:numel].view(torch.int8) - 8
    return codes.view(torch.int8).float() * steps.repeat_interleave(_BLOCKS[format].size)[:numel]


def _rounded_up(exact: Tensor) -> Tensor:
    """float64 >= 0 rounded up to bfloat16, so that no code exceeds the largest."""
    near = exact.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.double() < exact, above, near)


def _float32(tensors: Tensors) -> Tensors:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise WireError(f"{name} has dtype {tensor.dtype}; what travels is float32")
    return tensors


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise WireError(f"{name} has values that are not finite")
