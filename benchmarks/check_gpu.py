"""Whether training is right on this machine's GPU, how fast it is, and how much memory it takes.

    python -m benchmarks.check_gpu [--rehearse] [--minutes 8]

The models have real shapes and random weights. Four parts, each a list of claims that hold or
fail:

- ``small``: tiny models in float64. A bank trains as clients one by one, and as on the CPU.
- ``cards``: tiny models in float64 with their layers on two GPUs. A round of B and one of A end as
  on the CPU. Left out on a machine with one GPU.
- ``encoder``: RoBERTa-Large with 50 clients in float32. A bank trains as clients one by one, and
  one client as with PEFT. Then in bfloat16, for rows of several lengths: milliseconds a client
  step in the bank and one by one, the highest memory, and the share of the GPU's own matrix rate
  that the bank reaches, counting 4 FLOPs per weight and token (one forward pass and the gradient of
  the inputs).
- ``decoder``: Llama-2-7B in bfloat16 and nf4. ``rolora.start`` trains a round of B and one of A;
  the highest memory is within what ``rolora plan`` says.

A part that does not begin within ``--minutes`` is left out. ``--rehearse`` does the same with tiny
shapes on the CPU, but for nf4, and has no count of memory. The record, by default
benchmarks/records/gpu.json, is written after every part. Exit code 1 if a claim fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers
from torch.nn import functional

from benchmarks.place import ROOT
from rolora.config.load import load_config
from rolora.data.examples import Examples, collate
from rolora.errors import RoloraError
from rolora.files import write_file
from rolora.methods import get_method
from rolora.model.base import Base, with_bank
from rolora.model.peft import LoraSettings
from rolora.plan.needs import make_plan
from rolora.run import runs
from rolora.run.experiment import Experiment
from rolora.tasks.classification import classification
from rolora.tasks.registry import Task
from rolora.training.local import Work, batches, train_group
from rolora.training.settings import LocalSettings

sys.path.insert(0, str(ROOT / "tests"))  # as pytest does
import tiny
import tiny_clients
from states import relative

LABELS = ("no", "yes")
ROBERTA_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50265,
    "max_position_embeddings": 4098,  # beyond the real 514, for the longest rows here
}
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 400,
}
OVER_PLAN = 1.1  # the plan leaves out what torch's allocator keeps between tensors


@dataclass(frozen=True)
class Claim:
    """``what`` holds if ``found`` is at most ``bound``."""

    what: str
    found: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.found <= self.bound

    def __str__(self) -> str:
        failed = "" if self.holds else "FAILED: "
        return f"{failed}{self.what} {self.found:.3g} (at most {self.bound:g})"


@dataclass(frozen=True)
class Speed:
    """Client steps with so many ``tokens``: of one round of B and one of A, medians of five."""

    tokens: int
    bank_ms: float
    one_by_one_ms: float
    matrix_rate_share: float
    peak_gib: float

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: {self.bank_ms:.2f} ms a client step in the bank, "
            f"{self.one_by_one_ms:.2f} one by one, {self.matrix_rate_share:.1%} of the matrix "
            f"rate, {self.peak_gib:.2f} GiB"
        )


@dataclass(frozen=True)
class LeftOut:
    """Claims that cannot be made on this machine, and why."""

    why: str

    def __str__(self) -> str:
        return f"left out: {self.why}"


@dataclass(frozen=True)
class Machine:
    """Where it runs, and whether it is a rehearsal."""

    device: str
    rehearsal: bool

    def settle(self) -> None:
        """Wait until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Count the highest memory from here on."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The highest memory of tensors in bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def seconds(self, work: Callable[[], object]) -> float:
        """How long the device works on it."""
        self.settle()
        started = time.perf_counter()
        work()
        self.settle()
        return time.perf_counter() - started

    def matrix_rate(self) -> float:
        """FLOPs a second of one large bfloat16 product."""
        width = 256 if self.rehearsal else 8192
        left = torch.randn(width, width, device=self.device, dtype=torch.bfloat16)
        times = [self.seconds(lambda: left @ left) for _ in range(12)]
        return 2 * width**3 / median(times[2:])


Found = Iterator[Claim | Speed | LeftOut]


def small(machine: Machine) -> Found:
    """Tiny models of four families in float64; differences are relative."""
    makers = {
        "bert": tiny_clients.classifier,
        "roberta": tiny_clients.classifier,
        "llama": tiny_clients.language_model,
        "gpt2": tiny_clients.language_model,
    }
    settings = LocalSettings(steps=3, batch_size=4)
    for name, make in makers.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = make(getattr(tiny, f"tiny_{name}")(Path(folder)))
        work = bench.work(settings)
        expected = bench.train(work, settings)
        bench.base.model.to(machine.device)
        together = bench.train(work, settings)
        alone = [bench.train([one], settings)[0] for one in work]
        for what, others in (("clients one by one", alone), ("on the CPU", expected)):
            apart = max(
                relative(a.adapter, b.adapter) for a, b in zip(together, others, strict=True)
            )
            yield Claim(f"{name}: a bank trains as {what}", apart, 1e-9)


def roberta(machine: Machine, dtype: torch.dtype) -> tuple[Base, Task, Any]:
    """RoBERTa-Large with weights drawn on the device, rank 8 on query and value, and a copy of the
    plain model."""
    shape = TINY | {"max_position_embeddings": 600} if machine.rehearsal else ROBERTA_LARGE
    config = transformers.AutoConfig.for_model("roberta", **shape, pad_token_id=1, num_labels=2)
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    plain = copy.deepcopy(model) if dtype == torch.float32 else None
    tokenizer = SimpleNamespace(pad_token_id=1, is_fast=True)
    settings = LoraSettings(rank=8, alpha=16.0, target_modules=("query", "value"))
    base = with_bank(model, tokenizer, "classification", settings, "RoBERTa-Large")
    return base, classification(base, LABELS, ["text"], "label", 4096), plain


def rows(base: Base, clients: int, tokens: int) -> tuple[Examples, list[torch.Tensor]]:
    """Two rows a client of uneven length, ``tokens`` together on average; and its row indices."""
    rng = torch.Generator().manual_seed(0)
    model: Any = base.model
    spread = max(tokens // 8, 1)
    lengths = tokens // 2 + torch.randint(-spread, spread + 1, (2 * clients,), generator=rng)
    ids = torch.randint(10, model.config.vocab_size, (int(lengths.sum()),), generator=rng)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    labels = torch.arange(2 * clients) % 2
    return Examples(ids.int(), offsets, labels), list(torch.split(torch.arange(2 * clients), 2))


def encoder(machine: Machine) -> Found:
    """RoBERTa-Large: right in float32, then timed in bfloat16."""
    clients = 6 if machine.rehearsal else 50
    base, task, plain = roberta(machine, torch.float32)
    examples, shards = rows(base, clients, 64)
    method, settings = get_method("fedit"), LocalSettings(steps=2, batch_size=2)
    start = method.init(base.specs, torch.Generator().manual_seed(0))
    work = [Work(f"c{i}", shard, start, 2) for i, shard in enumerate(shards)]

    def train(group: list[Work]) -> list[Any]:
        return train_group(base, task, examples, group, method, settings, lr=1e-3, seed=0, round=1)

    together, alone = train(work), [train([one])[0] for one in work]
    apart = max(relative(a.adapter, b.adapter) for a, b in zip(together, alone, strict=True))
    yield Claim("float32: a bank trains as clients one by one", apart, 1e-3)

    config = copy.deepcopy(base.peft_config)
    config.inference_mode = False
    model = peft.get_peft_model(plain, config, autocast_adapter_dtype=False).eval()
    peft.set_peft_model_state_dict(model, dict(start))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-3, weight_decay=settings.weight_decay)
    stream = batches(work[0], 2, seed=0, round=1)
    for _ in range(2):
        batch = collate(examples, next(stream), base.tokenizer.pad_token_id).to(base.device)
        adamw.zero_grad()
        loss = functional.cross_entropy(model(**batch.inputs).logits, batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()
    theirs = {key: x.cpu() for key, x in peft.get_peft_model_state_dict(model).items()}
    apart = relative(together[0].adapter, theirs)
    yield Claim("float32: a client trains as with PEFT", apart, 1e-3)
    del base, task, plain, model

    rate = machine.matrix_rate()
    base, task, _ = roberta(machine, torch.bfloat16)
    for tokens in (32, 128) if machine.rehearsal else (32, 128, 512, 2048):
        yield speed(machine, base, task, clients, tokens, rate)


def speed(
    machine: Machine, base: Base, task: Task, clients: int, tokens: int, rate: float
) -> Speed:
    """One step of B and one of A of all clients, in the bank and one by one: 5 times in turns."""
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

    train(work)
    one_by_one()
    machine.forget_peak()
    pairs = [(machine.seconds(lambda: train(work)), machine.seconds(one_by_one)) for _ in range(5)]
    together, alone = (median(times) for times in zip(*pairs, strict=True))
    weights = sum(p.numel() for n, p in base.model.named_parameters() if "embed" not in n)
    flops = 4 * weights * 2 * int(examples.lengths.sum()) / together
    steps = 2 * clients
    return Speed(
        tokens, together / steps * 1e3, alone / steps * 1e3, flops / rate, machine.peak() / 2**30
    )


def decoder(machine: Machine) -> Found:
    """Llama-2-7B as a user trains it: a checkpoint, a file of rows, a configuration."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = tiny.chat_tokenizer()
        shape = TINY | {"vocab_size": len(tokenizer)} if machine.rehearsal else LLAMA_2_7B
        config = transformers.AutoConfig.for_model(
            "llama", **shape, pad_token_id=tokenizer.pad_token_id
        )
        with torch.device(machine.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        del model
        asked = [{"prompt": text, "completion": f" {text}"} for text in tiny.SENTENCES * 20]
        lines = "".join(json.dumps(row) + "\n" for row in asked)
        (folder / "rows.jsonl").write_text(lines)
        (folder / "run.toml").write_text(
            f"""\
device = "{machine.device}"
[model]
path = "model"
task = "causal_lm"
[lora]
target_modules = ["q_proj", "v_proj"]
[data]
train = "rows.jsonl"
test = 0.1
prompt = "prompt"
completion = "completion"
[partition]
clients = 10
[train]
rounds = 2
local_steps = 2
batch_size = 2
lr = 1e-3
"""
        )
        for dtype in ("bf16",) if machine.rehearsal else ("bf16", "nf4"):
            yield from two_rounds(machine, folder, dtype)


def two_rounds(machine: Machine, folder: Path, dtype: str) -> Found:
    """A round of B and one of A of the run in this folder."""
    config = load_config(folder / "run.toml", [f"model.dtype={dtype}"])
    planned = make_plan(Experiment(config)).methods[0]
    machine.forget_peak()
    _, *rounds = runs.start(config, folder / dtype).rounds()
    for result in rounds:
        lost = math.inf if result.loss is None else result.loss
        yield Claim(f"{dtype}: loss of training {'+'.join(result.factors)}", lost, 100.0)
        error = math.inf if result.aggregation_error is None else result.aggregation_error
        yield Claim(f"{dtype}: aggregation error of round {result.round}", error, 1e-6)
    peaks = [plan.peak for plan in planned.rounds if plan.peak is not None]
    if machine.device == "cuda" and peaks:
        over = machine.peak() / max(peaks)
        yield Claim(f"{dtype}: highest memory, as a share of the plan's", over, OVER_PLAN)


def cards(machine: Machine) -> Found:
    """Tiny models in float64 with their layers on two GPUs; differences are relative."""
    if not machine.rehearsal and torch.cuda.device_count() < 2:
        yield LeftOut("this machine has one GPU, and the claims are about two")
        return
    devices = [torch.device("cpu" if machine.rehearsal else f"cuda:{index}") for index in (0, 1)]
    makers = {"bert": tiny_clients.classifier, "llama": tiny_clients.language_model}
    settings, method = LocalSettings(steps=3, batch_size=4), get_method("rolora")
    for name, make in makers.items():
        with tempfile.TemporaryDirectory() as folder:
            model = getattr(tiny, f"tiny_{name}")(Path(folder))
            benches = make(model), make(model, devices=devices)
        work = benches[0].work(settings)
        for round, what in ((1, "B"), (2, "A")):
            exact, spread = (b.train(work, settings, method=method, round=round) for b in benches)
            apart = max(relative(a.adapter, b.adapter) for a, b in zip(spread, exact, strict=True))
            yield Claim(f"{name}: {what} is trained on two GPUs as on the CPU", apart, 1e-9)


PARTS = {"small": small, "cards": cards, "encoder": encoder, "decoder": decoder}


def main() -> int:
    """Do the parts and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check_gpu", description="Check training on this machine's GPU."
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after these")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records" / "gpu.json")
    asked = parser.parse_args()
    if not asked.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: install a CUDA build, or try --rehearse")
    machine = Machine("cpu" if asked.rehearse else "cuda", asked.rehearse)
    torch.backends.cuda.matmul.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    record: dict[str, Any] = {
        "device": "a rehearsal" if asked.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "parts": {},
    }
    failed, started = False, time.perf_counter()
    for name, part in PARTS.items():
        if time.perf_counter() - started > 60 * asked.minutes:
            print(f"{name}: left out, since {asked.minutes:g} minutes have passed")
            continue
        found: list[Any] = []
        try:
            for one in part(machine):
                found.append(asdict(one))
                failed |= isinstance(one, Claim) and not one.holds
                print(f"{name}: {one}", flush=True)
        except (RoloraError, RuntimeError) as error:
            failed = True
            found.append({"error": str(error)})
            print(f"{name}: FAILED: {error}", flush=True)
        record["parts"][name] = found
        write_file(asked.out, json.dumps(record, indent=1) + "\n")
    print(f"wrote {asked.out} after {time.perf_counter() - started:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
