"""An adapter to bytes and back: how fast, and how many bytes beside the payload."""

from __future__ import annotations

from benchmarks.place import Place

FORMATS = ("safetensors_bytes", "torch_file", "pickled", "flower_record", "flower_parameters")
TENSORS, SHAPE = 96, (4, 1024)  # rank 4 on query and value of RoBERTa-Large: 1.6 MB


def run(place: Place) -> None:
    """Measure saving, then loading."""
    for direction in ("save", "load"):
        numbers = (TENSORS, *SHAPE, place.threads)
        parties = [
            place.party("serialise", name, direction, *numbers, name=name) for name in FORMATS
        ]
        place.measured(f"serialisation-{direction}", parties, 5, tensors=TENSORS, shape=SHAPE)
