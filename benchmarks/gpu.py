"""The bank against clients one by one on a GPU: models of real shapes, random weights.

    python -m benchmarks.gpu [--model roberta-large|llama-1b|llama-8b|tiny] [--device cuda]
                             [--tokens 32,128,512,2048] [--clients 16]

Per size: milliseconds a client step both ways, in turns; the share of the machine's own matrix rate
(measured first) that the bank reaches, counting 4 FLOPs per weight and token (one forward pass and
the gradient of the inputs); and the highest memory. Rows of uneven length, so that grouped matrix
products are used where torch has them. Prints a table and writes benchmarks/records/gpu-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from benchmarks.place import ROOT
from rolora.data.examples import Examples
from rolora.files import write_file
from rolora.methods import get_method
from rolora.model.base import Base, with_bank
from rolora.model.peft import Kind, LoraSettings
from rolora.tasks.causal_lm import causal_lm
from rolora.tasks.classification import classification
from rolora.tasks.registry import Task
from rolora.training.local import Work, train_group
from rolora.training.settings import LocalSettings

LABELS = ("no", "yes")
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
ROBERTA_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50265,
    "max_position_embeddings": 4098,  # beyond the real 514, for the longest rows here
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 200}
SHAPES = {
    "roberta-large": ("roberta", ROBERTA_LARGE),
    "llama-1b": ("llama", LLAMA_1B),
    "llama-8b": ("llama", LLAMA_8B),
    "tiny": ("llama", TINY | {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


def load(name: str, device: str) -> tuple[Base, Task]:
    """The model on ``device`` in bfloat16, weights drawn there, rank 8 on query and value."""
    family, shape = SHAPES[name]
    config = transformers.AutoConfig.for_model(family, **shape, pad_token_id=1, num_labels=2)
    kind: Kind = "classification" if family == "roberta" else "causal_lm"
    auto = transformers.AutoModelForSequenceClassification
    if kind == "causal_lm":
        auto = transformers.AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=torch.bfloat16)
    settings = LoraSettings(rank=8, alpha=16.0)
    base = with_bank(model, SimpleNamespace(pad_token_id=1, is_fast=True), kind, settings, name)
    if kind == "causal_lm":
        return base, causal_lm(base, prompt="", completion="text", messages=None, max_length=4096)
    return base, classification(base, LABELS, ["text"], "label", 4096)


def rows(base: Base, clients: int, tokens: int) -> tuple[Examples, list[torch.Tensor]]:
    """Two rows a client of uneven length, ``tokens`` together on average; and its row indices."""
    rng = torch.Generator().manual_seed(0)
    model: Any = base.model
    spread = max(tokens // 8, 1)
    lengths = tokens // 2 + torch.randint(-spread, spread + 1, (2 * clients,), generator=rng)
    total = int(lengths.sum())
    ids = torch.randint(10, model.config.vocab_size, (total,), generator=rng)
    labels = torch.ones(total, dtype=torch.uint8)
    if base.head_layers:
        labels = torch.arange(2 * clients) % 2
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Examples(ids.int(), offsets, labels), list(torch.split(torch.arange(2 * clients), 2))


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the device is done."""

    def settle() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started


def matrix_rate(device: str) -> float:
    """FLOPs a second of one large bfloat16 product."""
    width = 8192 if device == "cuda" else 512
    left = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    times = [timed(lambda: left @ left, device) for _ in range(12)]
    return 2 * width**3 / median(times[2:])


def measure(base: Base, task: Task, clients: int, tokens: int, device: str) -> dict[str, float]:
    """One B and one A step of all clients, together and one by one, five times each in turns."""
    examples, shards = rows(base, clients, tokens)
    method, settings = get_method("rolora"), LocalSettings(steps=1, batch_size=2)
    start = method.init(base.specs, torch.Generator().manual_seed(0))
    work = [Work(f"c{i}", shard, start, 1) for i, shard in enumerate(shards)]

    def train(group: list[Work]) -> None:
        for round in (1, 2):
            train_group(base, task, examples, group, method, settings, lr=1e-4, seed=0, round=round)

    def one_by_one() -> None:
        for one in work:
            train([one])

    timed(lambda: train(work), device)
    timed(one_by_one, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    together, alone = [], []
    for _ in range(5):
        together.append(timed(lambda: train(work), device))
        alone.append(timed(one_by_one, device))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    weights = sum(p.numel() for n, p in base.model.named_parameters() if "embed" not in n)
    steps = 2 * clients
    flops = 4 * weights * 2 * int(examples.lengths.sum()) / median(together)
    return {
        "tokens": tokens,
        "bank_ms": median(together) / steps * 1e3,
        "alone_ms": median(alone) / steps * 1e3,
        "ratio": median(a / b for a, b in zip(alone, together, strict=True)),
        "flops": flops,
        "peak_gib": peak / 2**30,
    }


def main() -> None:
    """Measure the sizes asked for and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--model", choices=SHAPES, default="roberta-large")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", default="32,128,512,2048")
    parser.add_argument("--clients", type=int, default=16)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: install a CUDA build, or try --device cpu")
    rate = matrix_rate(asked.device)
    base, task = load(asked.model, asked.device)
    print(f"{asked.model}, {asked.clients} clients; matrix rate {rate / 1e12:.2f} TFLOP/s")
    print("tokens  bank ms  one by one ms  ratio  of matrix rate  peak GiB")
    found = []
    for tokens in map(int, asked.tokens.split(",")):
        at = measure(base, task, asked.clients, tokens, asked.device)
        found.append(at)
        print(
            f"{tokens:6d}  {at['bank_ms']:7.2f}  {at['alone_ms']:13.2f}  {at['ratio']:5.2f}"
            f"  {at['flops'] / rate:14.1%}  {at['peak_gib']:8.2f}",
            flush=True,
        )
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    record = {"device": name, "torch": torch.__version__, "matrix_rate": rate, "sizes": found}
    where = ROOT / "benchmarks" / "records" / f"gpu-{asked.model}.json"
    write_file(where, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
