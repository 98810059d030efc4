"""An adapter to bytes and back, as different programs do it.

Timed: one way, ``save`` or ``load``, repeated until about a third of a second has passed.
``torch_file`` and ``pickled`` are here for their time alone: reading them runs code, so rolora
does neither.

    python -m benchmarks.peers.serialise FORMAT save|load TENSORS ROWS COLUMNS THREADS
"""

from __future__ import annotations

import io
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from benchmarks.party import Answer, serve

Adapter = dict[str, Tensor]
Format = tuple[Callable[[Adapter], bytes], Callable[[bytes], object]]


def safetensors_bytes() -> Format:
    """What rolora writes and reads."""
    return save, load


def torch_file() -> Format:
    """torch.save, and torch.load with weights_only."""

    def dump(adapter: Adapter) -> bytes:
        file = io.BytesIO()
        torch.save(adapter, file)
        return file.getvalue()

    return dump, lambda content: torch.load(io.BytesIO(content), weights_only=True)


def pickled() -> Format:
    """pickle of NumPy arrays."""

    def dump(adapter: Adapter) -> bytes:
        return pickle.dumps({name: tensor.numpy() for name, tensor in adapter.items()})

    return dump, pickle.loads


def flower_record() -> Format:
    """Flower's ArrayRecord; its bytes are NumPy's .npy, one an array."""
    from flwr.app import ArrayRecord

    def dump(adapter: Adapter) -> Any:
        return ArrayRecord(adapter)

    return dump, lambda record: record.to_torch_state_dict()


def flower_parameters() -> Format:
    """Flower's classic ndarrays_to_parameters."""
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

    def dump(adapter: Adapter) -> Any:
        return ndarrays_to_parameters([tensor.numpy() for tensor in adapter.values()])

    return dump, parameters_to_ndarrays


FORMATS = (safetensors_bytes, torch_file, pickled, flower_record, flower_parameters)


def length(content: Any) -> int:
    """Bytes of what ``dump`` returned."""
    if isinstance(content, bytes):
        return len(content)
    if hasattr(content, "tensors"):
        return sum(map(len, content.tensors))
    return sum(len(array.data) for array in content.values())


if __name__ == "__main__":
    name, direction, *numbers = sys.argv[1:]
    tensors, rows, columns, threads = map(int, numbers)
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(0)
    adapter = {
        f"base_model.model.layer.{index}.lora_A.weight": torch.rand(rows, columns, generator=rng)
        for index in range(tensors)
    }
    payload = 4 * tensors * rows * columns
    dump, back = next(one for one in FORMATS if one.__name__ == name)()
    content = dump(adapter)

    def run() -> Answer:
        times, started = 0, time.perf_counter()
        while time.perf_counter() - started < 0.3:
            if direction == "save":
                dump(adapter)
            else:
                back(content)
            times += 1
        return {"units": times * payload / 1e6, "bytes": length(content), "payload": payload}

    serve(run)
