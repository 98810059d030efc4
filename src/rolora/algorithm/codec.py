"""What a client sends, as bytes: its values in float32, or its change in fewer bits.

``fp32`` sends the values themselves. The other formats send the *move*, trained − received (client
and server both hold the latter), plus the *residual*: what rounding kept back of the client's last
upload of the same tensor (error feedback: Seide et al., Interspeech 2014; Karimireddy et al., ICML
2019, arXiv:1901.09847). Rounding is to nearest, not random. ``docs/wire.md`` says why a residual
may wait for rounds in which its tensor is not sent.

====== ======================== =============================== ================
format code of one element      scale                           bytes an element
====== ======================== =============================== ================
fp32   float32                  none                            4
bf16   bfloat16                 none                            2
int8   −127 … 127               one bfloat16 per 128 elements   1.016
int4   −7 … 7, two to a byte    one bfloat16 per 32 elements    0.563
====== ======================== =============================== ================

**Sparse.** For a method that sends few directions, a rank-one piece (a row of lora_A, a column of
lora_B, or a whole head tensor) travels only if it differs from what was received. One bit per
piece, before the codes, says which travel. The residual of a piece that does not travel is kept.

A payload is one safetensors file with one tensor of bytes. The tensor's name holds the format and a
digest of names and shapes, which the receiver knows and compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from rolora.algorithm.adapter import pieces, role_of
from rolora.algorithm.choices import Format
from rolora.errors import RoloraError

Tensors = Mapping[str, Tensor]


class WireError(RoloraError):
    """A tensor that cannot be encoded, or a payload that cannot be decoded."""


_BLOCK = {"int8": 128, "int4": 32}  # elements that share a scale
_LARGEST = {"int8": 127, "int4": 7}  # code
_ALL = torch.ones(1, dtype=torch.bool)  # the one piece of a dense upload travels


def num_bytes(format: Format, like: Tensors) -> int:
    """Bytes of codes and scales for tensors of these shapes, all of which travel."""
    return sum(_size(format, tensor.numel()) for tensor in like.values())


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
    _check_float32(received)
    bits, codes, kept = [], [torch.empty(0, dtype=torch.uint8)], {}
    for name in sorted(received):
        start, values = received[name], trained[name].detach()
        wanted = values if format == "fp32" else values - start
        if format != "fp32" and name in residual:
            wanted = wanted + residual[name]
        _check_finite(name, wanted)
        chosen = _ALL
        if sparse:
            chosen = (_pieces(name, values, sparse) != _pieces(name, start, sparse)).any(dim=1)
            bits.append(_bits(chosen))
        travels = _pieces(name, wanted, sparse)[chosen].view(-1)
        codes.append(_pack(format, travels))
        if format != "fp32":
            arrives = torch.zeros(wanted.shape)
            _put(arrives, _unpack(format, name, codes[-1], len(travels)), name, chosen, sparse)
            _check_finite(name, start + arrives)
            kept[name] = wanted - arrives
    return save({_title(format, received, sparse): torch.cat([*bits, *codes])}), kept


def decode(
    format: Format, payload: bytes, received: Tensors, *, sparse: bool = False
) -> dict[str, Tensor]:
    """The values in a payload, float32; ``received`` is what the sender started from.

    A payload is not trusted: its length and header must be, byte for byte, those of the only file
    that fits, so no header is parsed. Raises WireError otherwise, and for scales or values that are
    not finite.
    """
    _check_float32(received)
    bits, chosen = _travelling(payload, received) if sparse else (0, dict.fromkeys(received, _ALL))
    counts = {
        name: int(chosen[name].sum()) * _pieces(name, received[name], sparse).shape[1]
        for name in sorted(received)
    }
    size = bits + sum(_size(format, count) for count in counts.values())
    # all bytes before the first code, as safetensors writes them
    header = save({_title(format, received, sparse): torch.zeros(size, dtype=torch.uint8)})
    header = header[: len(header) - size]
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
    values, at = {}, bits
    for name, count in counts.items():
        start, end = received[name], at + _size(format, count)
        arrived = _unpack(format, name, body[at:end].clone(), count)
        whole = torch.zeros(start.shape)
        if format == "fp32":
            whole.copy_(start)
        _put(whole, arrived, name, chosen[name], sparse)
        values[name] = whole if format == "fp32" else start + whole
        _check_finite(name, values[name])
        at = end
    return values


def _pieces(name: str, tensor: Tensor, sparse: bool) -> Tensor:
    """(pieces, width), a view. In a dense upload a tensor is one piece, which always travels."""
    if sparse and role_of(name) in ("A", "B"):
        return pieces(name, tensor)
    return tensor.reshape(1, -1)


def _put(whole: Tensor, flat: Tensor, name: str, chosen: Tensor, sparse: bool) -> None:
    """Write what arrived to the chosen pieces of ``whole``, which is contiguous."""
    rows = _pieces(name, whole, sparse)
    rows[chosen] = flat.view(-1, rows.shape[1])


def _bits(chosen: Tensor) -> Tensor:
    """bool (n,) -> uint8, eight to a byte, the first in its lowest bit."""
    eights = torch.nn.functional.pad(chosen.to(torch.uint8), (0, -len(chosen) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)


def _travelling(payload: bytes, received: Tensors) -> tuple[int, dict[str, Tensor]]:
    """The bytes of a sparse payload's bits, and which pieces they say travel.

    None travels if the payload is too short.
    """
    start = at = len(payload) - body_bytes(payload)
    chosen = {}
    for name in sorted(received):
        count = len(_pieces(name, received[name], sparse=True))
        end = at + -(-count // 8)
        eights = torch.tensor([*payload[at:end].ljust(end - at, b"\0")], dtype=torch.uint8)[:, None]
        chosen[name] = (eights >> torch.arange(8, dtype=torch.uint8) & 1).view(-1)[:count].bool()
        at = end
    return at - start, chosen


def _title(format: Format, like: Tensors, sparse: bool) -> str:
    layout = "".join(f"{name} {tuple(like[name].shape)}\n" for name in sorted(like))
    kind = f"{format}-sparse" if sparse else format
    return f"{kind}-{hashlib.sha256(layout.encode()).hexdigest()[:8]}"


def _size(format: Format, numel: int) -> int:
    """Bytes of the codes and scales of this many elements."""
    scales = 2 * -(-numel // _BLOCK[format]) if format in _BLOCK else 0
    return _codes(format, numel) + scales


def _codes(format: Format, numel: int) -> int:
    """Bytes of the codes of this many elements."""
    return {"fp32": 4 * numel, "bf16": 2 * numel, "int8": numel, "int4": -(-numel // 2)}[format]


def _pack(format: Format, flat: Tensor) -> Tensor:
    """float32 (n,) -> uint8: codes, then scales."""
    if format == "fp32":
        return flat.view(torch.uint8)
    if format == "bf16":
        return flat.to(torch.bfloat16).view(torch.uint8)
    size = _BLOCK[format]
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    scales = _rounded_up(blocks.abs().amax(dim=1).double() / _LARGEST[format])
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
    return codes.view(torch.int8).float() * steps.repeat_interleave(_BLOCK[format])[:numel]


def _rounded_up(exact: Tensor) -> Tensor:
    """float64 >= 0 rounded up to bfloat16, so that no code exceeds the largest."""
    near = exact.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.double() < exact, above, near)


def _check_float32(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise WireError(f"{name} has dtype {tensor.dtype}; what travels is float32")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise WireError(f"{name} has values that are not finite")
