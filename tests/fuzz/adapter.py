"""An adapter folder of PEFT: adapter_config.json, and the safetensors file of its tensors."""

from __future__ import annotations

import json

import peft
import torch
from safetensors.torch import save

from fuzz import folder
from rolora.algorithm.adapter import Role, Specs, TensorSpec
from rolora.errors import ConfigError
from rolora.model.peft import WEIGHTS, read_adapter

BETWEEN = b"\xff\xff"  # the two files, in no text
RANK = 2
_layers = {f"base_model.model.layer.{i}.{name}": 4.0 for i in (0, 1) for name in ("q", "v")}
_roles: tuple[tuple[Role, tuple[int, ...]], ...] = (("A", (RANK, 5)), ("B", (3, RANK)))
SPECS = Specs(
    (
        *(
            TensorSpec(f"{layer}.lora_{role}.weight", role, shape)
            for layer in _layers
            for role, shape in _roles
        ),
        TensorSpec("base_model.model.classifier.bias", "head", (3,)),
    ),
    _layers,
    {},
)
_config = json.loads(
    json.dumps(
        peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["q", "v"]).to_dict(), default=sorted
    )
)
_tensors = {spec.name: torch.ones(spec.shape) for spec in SPECS.tensors}
_ranks = {"rank_pattern": {"layer.0.q": 3}, "alpha_pattern": {".*v": 5, "1.q": 3}}
_wider = {
    name: torch.ones(*(3 if size == RANK else size for size in tensor.shape)).half()
    for name, tensor in _tensors.items()
    if "layer.0.q" in name
}
SEEDS = [
    bytes([any_rank]) + json.dumps(config).encode() + BETWEEN + save(tensors)
    for any_rank, config, tensors in (
        (0, _config, _tensors),
        (0, {"use_rslora": True}, {n: t for n, t in _tensors.items() if "lora" in n}),
        (1, {**_config, **_ranks}, {**_tensors, **_wider}),
        (0, {**_config, "use_dora": True}, _tensors),
    )
]
_folder = folder()


def target(data: bytes) -> None:
    """The first byte says whether layers may differ in rank; then the files, ``BETWEEN`` them."""
    if not data:
        return
    config, between, weights = data[1:].partition(BETWEEN)
    (_folder / "adapter_config.json").write_bytes(config)
    (_folder / WEIGHTS).write_bytes(weights if between else save(_tensors))
    try:
        adapter = read_adapter(_folder, SPECS, any_rank=bool(data[0] & 1))
    except ConfigError:
        return
    shapes = {spec.name: spec for spec in SPECS.tensors}
    assert adapter.keys() <= shapes.keys()
    assert adapter.scaling == _layers
    for layer in _layers:
        down, up = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        assert (down.shape[1], up.shape[0]) == (5, 3)
        assert down.shape[0] == up.shape[1]
        assert data[0] & 1 or down.shape[0] == RANK
    for name, tensor in adapter.items():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all(), name
