"""The server's mean over many updates, in bytes a second, against reading memory."""

from __future__ import annotations

from benchmarks.place import Place

WAYS = (
    "rolora_mean",
    "rolora_mean_float32",
    "numpy_mean",
    "torch_mean",
    "python_sum",
    "flower_aggregate",
    "flower_records",
    "read",
)

# name, clients, tensors, shape: one factor of rank 4 in RoBERTa-Large, of rank 16 in a 7 B model
SETTINGS = (
    ("aggregation-small", 50, 48, (4, 1024)),
    ("aggregation-large", 20, 64, (16, 4096)),
)


def run(place: Place) -> None:
    """Measure both sizes."""
    for name, clients, tensors, shape in SETTINGS[: 1 if place.quick else None]:
        numbers = (clients, tensors, *shape, place.threads)
        parties = [place.party("aggregate", way, *numbers, name=way) for way in WAYS]
        place.measured(name, parties, 5, clients=clients, tensors=tensors, shape=shape)
