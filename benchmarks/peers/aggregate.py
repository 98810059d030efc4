"""The mean of N clients' updates that lie in memory, as different programs compute it.

Timed: from the list of updates to the mean, repeated until about half a second has passed.
``read`` reads as many bytes from one array and keeps a sum: no mean can be faster than that.

    python -m benchmarks.peers.aggregate WAY CLIENTS TENSORS ROWS COLUMNS THREADS
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.party import Answer, serve

Updates = list[dict[str, Tensor]]
Way = Callable[[], object]


def rolora_mean(updates: Updates, dtype: Literal["float64", "float32"] = "float64") -> Way:
    """rolora's reducer: streaming, summed in float64."""
    from rolora.algorithm.reduce import mean

    reducer, rng = mean(dtype=dtype), torch.Generator()

    def way() -> object:
        memory = reducer.init()
        for update in updates:
            memory = reducer.add(memory, update, update, 1.0)
        return reducer.finish(memory, rng)

    return way


def rolora_mean_float32(updates: Updates) -> Way:
    """The same reducer, summed in float32."""
    return rolora_mean(updates, "float32")


def numpy_mean(updates: Updates) -> Way:
    """np.mean of a stack, tensor by tensor, in float32."""
    import numpy as np

    arrays = [{name: tensor.numpy() for name, tensor in update.items()} for update in updates]
    return lambda: {
        name: np.mean(np.stack([one[name] for one in arrays]), axis=0) for name in arrays[0]
    }


def torch_mean(updates: Updates) -> Way:
    """torch.stack(...).mean(0), tensor by tensor, in float32."""
    return lambda: {
        name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]
    }


def python_sum(updates: Updates) -> Way:
    """sum(...) / N, tensor by tensor, in float32."""

    def way() -> object:
        return {
            name: torch.as_tensor(sum(update[name] for update in updates)) / len(updates)
            for name in updates[0]
        }

    return way


def flower_aggregate(updates: Updates) -> Way:
    """Flower's aggregate of lists of NumPy arrays, which its classic strategies call."""
    from flwr.server.strategy.aggregate import aggregate

    arrays = [([tensor.numpy() for tensor in update.values()], 1) for update in updates]
    return lambda: aggregate(arrays)


def flower_records(updates: Updates) -> Way:
    """Flower's aggregate of ArrayRecords, which FedAvg calls; records hold serialised arrays."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records: list[Any] = [
        RecordDict({"arrays": ArrayRecord(u), "metrics": MetricRecord({"num-examples": 1})})
        for u in updates
    ]
    return lambda: aggregate_arrayrecords(records, "num-examples")


def read(updates: Updates) -> Way:
    """torch.sum over one array of the same size, far larger than the cache."""
    whole = torch.cat([tensor.flatten() for update in updates for tensor in update.values()])
    updates.clear()
    return lambda: whole.sum()


WAYS = (
    rolora_mean,
    rolora_mean_float32,
    numpy_mean,
    torch_mean,
    python_sum,
    flower_aggregate,
    flower_records,
    read,
)

if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    clients, tensors, rows, columns, threads = map(int, numbers)
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(0)
    updates = [
        {f"{index:03d}": torch.rand(rows, columns, generator=rng) for index in range(tensors)}
        for _ in range(clients)
    ]
    size = 4 * clients * tensors * rows * columns
    way = next(way for way in WAYS if way.__name__ == name)(updates)

    def run() -> Answer:
        times, started = 0, time.perf_counter()
        while time.perf_counter() - started < 0.5:
            way()
            times += 1
        return {"units": times * size / 1e9}

    serve(run)
