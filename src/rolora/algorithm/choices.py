"""What a configuration chooses of the algorithms by name. It is known without importing torch."""

from __future__ import annotations

from typing import Literal

from rolora.registry import Registry, attributes

Format = Literal["fp32", "bf16", "int8", "int4"]

SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedexp")

REDUCERS = Registry(
    kind="reducer",
    group="rolora.reducers",
    own=attributes(
        "rolora.algorithm",
        {
            "reduce": ("mean", "median", "trimmed_mean", "clip", *SERVER_OPTIMIZERS),
            "robust": (
                *("krum", "multi_krum", "bulyan", "geometric_median", "centered_clip"),
                *("fltrust", "nnm", "bucketing", "clip_product"),
            ),
        },
    ),
)
