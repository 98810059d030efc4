"""What a client sends: the decoder of uploads, in all formats."""

from __future__ import annotations

import itertools

import torch
from safetensors.torch import save
from torch import Tensor

from rolora.algorithm.choices import Format
from rolora.algorithm.codec import WireError, _title, decode, encode

FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")
SPARSE, BARE = 4, 8  # bits of the first byte, beside the format
_layer = "base_model.model.layer.0.query"
_random = torch.Generator().manual_seed(0)
RECEIVED = {
    name: torch.randn(shape, generator=_random)
    for name, shape in {
        f"{_layer}.lora_A.weight": (3, 50),
        f"{_layer}.lora_B.weight": (7, 3),
        "base_model.model.classifier.bias": (5,),
        "base_model.model.temperature": (),
    }.items()
}


def target(data: bytes) -> None:
    """The first byte says the format, and whether the rest is the payload or its tensor only."""
    if not data:
        return
    format, sparse = FORMATS[data[0] & 3], bool(data[0] & SPARSE)
    payload = data[1:]
    if data[0] & BARE:
        codes = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else _NONE
        payload = save({_title(format, RECEIVED, sparse): codes})
    try:
        values = decode(format, payload, RECEIVED, sparse=sparse)
    except WireError:
        return
    sound(values)
    if format == "fp32":
        again, _ = encode(format, values, RECEIVED, {}, sparse=sparse)
        back = decode(format, again, RECEIVED, sparse=sparse)
        assert all(torch.equal(back[name], values[name]) for name in values)


def sound(values: dict[str, Tensor]) -> None:
    """All names with their shapes, in finite float32."""
    assert values.keys() == RECEIVED.keys()
    for name, tensor in values.items():
        assert tensor.shape == RECEIVED[name].shape
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()


_NONE = torch.empty(0, dtype=torch.uint8)
_trained = {
    name: tensor + (torch.arange(tensor.numel()).view(tensor.shape) % 3 == 1) * 0.1
    for name, tensor in RECEIVED.items()
}


def _seeds(format: Format, sparse: bool) -> list[bytes]:
    payload, _ = encode(format, _trained, RECEIVED, {}, sparse=sparse)
    kind = FORMATS.index(format) | SPARSE * sparse
    body = payload[8 + int.from_bytes(payload[:8], "little") :]
    return [bytes([kind]) + payload, bytes([kind | BARE]) + body]


SEEDS = [
    seed
    for format, sparse in itertools.product(FORMATS, (False, True))
    for seed in _seeds(format, sparse)
]
