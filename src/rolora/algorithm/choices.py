"""What a configuration chooses of the algorithms by name. It is known without importing torch."""

from __future__ import annotations

from typing import Literal

from rolora.registry import Registry

Format = Literal["fp32", "bf16", "int8", "int4"]

REDUCERS = Registry(
    kind="reducer",
    group="rolora.reducers",
    own={
        name: f"rolora.algorithm.{module}:{name}"
        for module, names in {
            "reduce": ("mean", "median", "trimmed_mean", "clip", "fedavgm", "fedadam", "fedexp"),
            "robust": (
                *("krum", "multi_krum", "bulyan", "geometric_median", "centered_clip"),
                *("fltrust", "nnm", "bucketing", "clip_product"),
            ),
        }.items()
        for name in names
    },
)
SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedexp")
