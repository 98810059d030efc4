"""What every method has learned in a few tiny rounds, kept so that a change of the code can be
shown to leave it alone.

``python -m tests.golden write`` runs every case and keeps its tensors in ``tests/golden``;
``python -m tests.golden check [CASE ...]`` runs them again and compares. With the same version of
torch and the same kind of processor every bit must be the same; elsewhere the tensors are close.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_bert, tiny_llama
from tiny_site import write_rows
from torch import Tensor

import rolora

KEPT = Path(__file__).with_name("golden")
ROUNDS = 4
# where bits may differ, how far a tensor may be from what it was, as a share of its norm
TOLERANCE = 1e-4
# One number that falls on the other side of a rounding is 1/127 of the largest away. Of a gradient
# near zero AdamW takes a whole step, whose size hangs on the last bits. A product of full rank has
# small singular values, whose directions do too.
COARSE = {
    "rolora-int8": 2e-3,
    "sites-rolora-int8": 2e-3,
    "local-client-test": 1e-3,
    "fedex_lora": 1e-3,
    "fedmomentum": 1e-3,
    "fedmomentum-whole": 1e-3,
}

CLASSIFIER: dict[str, Any] = {
    "name": "golden",
    "model": {"path": "bert", "dtype": "fp32"},
    "lora": {"rank": 4, "alpha": 8, "target_modules": ["query", "value"]},
    "data": {"train": "train.csv", "test": "test.csv", "max_length": 32},
    "partition": {"scheme": "dirichlet", "clients": 4, "alpha": 1.0, "min_examples": 3},
    "train": {"rounds": ROUNDS, "local_steps": 3, "batch_size": 4, "bank": 3, "cache": ""},
    "eval": {"every": 9},
}
WRITER: dict[str, Any] = {
    **CLASSIFIER,
    "model": {"path": "llama", "task": "causal_lm", "dtype": "fp32"},
    "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "data": {
        "train": "writer-*.csv",
        "test": "test-writer.csv",
        "prompt": "ask",
        "completion": "say",
        "max_length": 64,
    },
    "partition": {"scheme": "files"},
}
PAIRS = (
    ("the cat sat on", " the mat"),
    ("what is the capital of France?", " Paris, of course."),
    ("a good film", " with a warm heart and a clever plot"),
    ("a bad film with", " no heart at all"),
    ("you answer in", " one short line"),
)


@dataclass(frozen=True)
class Case:
    """A run: its tables and overrides, and how it is carried out.

    ``stop``: the round after which it is left and resumed. ``sites``: across three sites, by
    function calls. ``like``: the case whose tensors it must end with, to the bit.
    """

    overrides: tuple[str, ...] = ()
    tables: dict[str, Any] = field(default_factory=lambda: CLASSIFIER)
    stop: int | None = None
    sites: bool = False
    like: str | None = None


def _cases() -> dict[str, Case]:
    """Name -> case: each method by its name, then variants."""
    ranks, held_out = "lora.rank=[4, 2, 1]", "data.client_test=0.3"
    robust = ("aggregate.reducer=trimmed_mean", "aggregate.trim=0.3", "aggregate.clip_norm=0.2")
    variants = {
        "rolora-int8": ("wire.up=int8",),
        "rolora-dropout": ("lora.dropout=0.3",),
        "rolora-head-frozen": ("model.head=freeze",),
        "rolora-trimmed-clipped": robust,
        "rolora-fedadam": ("aggregate.optimizer=fedadam",),
        "rolora-sgd-schedule": (
            "train.optimizer=sgd",
            "train.momentum=0.9",
            "train.lr=0.05",
            "train.b_lr_ratio=4",
            "train.schedule=cosine",
            "train.max_grad_norm=1.0",
        ),
        "rolora-top-layer": ("lora.layers=top:1", "train.cache=cache"),
        "fedmomentum-whole": ("method.name=fedmomentum", "method.energy=1.0"),  # with a rest
        "fedit-half": ("method.name=fedit", "train.participation=0.5"),
        "hetlora-ranks": ("method.name=hetlora", "method.gamma=0.5", ranks),
        "flexlora-ranks": ("method.name=flexlora", ranks),
        "raflora-ranks": ("method.name=raflora", ranks),
        "flora-ranks": ("method.name=flora", ranks),
        "lora_a2-ranks": ("method.name=lora_a2", ranks),
        "local-client-test": ("method.name=local", held_out),
        "fedsa_lora-client-test": ("method.name=fedsa_lora", held_out),
    }
    across = {
        "sites-rolora": (),
        "sites-rolora-int8": ("wire.up=int8",),
        "sites-fedsa_lora": ("method.name=fedsa_lora", held_out),
    }
    return {
        **{name: Case((f"method.name={name}",)) for name in rolora.method_names()},
        **{name: Case(overrides) for name, overrides in variants.items()},
        "rolora-llama": Case(tables=WRITER),
        "rolora-resumed": Case(stop=2, like="rolora"),
        "rolora-int8-resumed": Case(("wire.up=int8",), stop=2, like="rolora-int8"),
        **{name: Case(overrides, sites=True) for name, overrides in across.items()},
    }


CASES = _cases()


@dataclass(frozen=True)
class Result:
    """What a run leaves: file -> sha256 of its bytes, and "file/tensor" -> tensor."""

    hashes: dict[str, str]
    tensors: dict[str, Tensor]


def make_place(folder: Path) -> Path:
    """The tiny models and the rows that all cases run on."""
    tiny_bert(folder / "bert")
    tiny_llama(folder / "llama")
    write_rows(folder / "train.csv", 50)
    write_rows(folder / "test.csv", 6)
    for name, rows in {"a": 11, "b": 4, "c": 7, "d": 5}.items():
        _write_pairs(folder / f"writer-{name}.csv", rows)
    _write_pairs(folder / "test-writer.csv", 4)
    return folder


def _write_pairs(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ask", "say"])
        writer.writerows(PAIRS[row % len(PAIRS)] for row in range(count))


def run(case: Case, place: Path, out: Path) -> Result:
    """Carry a case out in the new folder ``out``, on one thread."""
    with _one_thread(), _no_page():
        if case.sites:
            return _read(out / "run", _across_sites(case, out))
        config = rolora.make_config(case.tables, case.overrides, root=place)
        rounds = rolora.start(config, out).rounds()
        for result in rounds:
            if result.round == case.stop:
                rounds.close()
        if case.stop is not None:
            for _ in rolora.resume(out).rounds():
                continue
        return _read(out, out / "clients")


def _across_sites(case: Case, out: Path) -> Path:
    """The run in ``out/run`` over function calls; the folder of what the sites keep."""
    import calls

    out.mkdir()
    place = calls.make_place(out)
    overrides = (f"train.rounds={ROUNDS}", "train.participation=1.0", *case.overrides)
    config = calls.configuration(place, *overrides)
    for _ in calls.remote(config, out / "run", calls.calls(place, out / "state")).rounds():
        continue
    return out / "state"


def _read(out: Path, clients: Path) -> Result:
    """The adapter, and the personal ones that clients have after the last round.

    All that is known here of the folders: the adapter's file, and that a client's folder holds
    files round-ROUND.safetensors somewhere.
    """
    files = {"adapter": out / "adapter" / "adapter_model.safetensors"}
    for file in sorted(clients.rglob("round-*.safetensors")):
        files[file.relative_to(clients).parts[0]] = file  # the last one is the newest
    tensors = {
        f"{key}/{name}": tensor
        for key, file in files.items()
        for name, tensor in load_file(file).items()
    }
    hashes = {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()}
    return Result(hashes, tensors)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_page() -> Iterator[None]:
    """No report at a run's end, which takes longer than the run, if it is written from there."""
    module = sys.modules[rolora.start.__module__]
    before = getattr(module, "write_report", None)
    if before is None:
        yield
        return
    vars(module)["write_report"] = lambda runs, out: None
    try:
        yield
    finally:
        vars(module)["write_report"] = before


def machine() -> dict[str, Any]:
    """What the bits depend on beside the code."""
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
    }


def kept() -> tuple[dict[str, Any], dict[str, Result]]:
    """The machine that wrote the values, and case -> its result."""
    notes = json.loads((KEPT / "golden.json").read_text())
    tensors = load_file(KEPT / "adapters.safetensors")
    results = {
        name: Result(
            hashes,
            {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")},
        )
        for name, hashes in notes["cases"].items()
    }
    return notes["machine"], results


def difference(found: Result, expected: Result) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of a tensor; inf if other ones are there."""
    if {k: t.shape for k, t in found.tensors.items()} != {
        k: t.shape for k, t in expected.tensors.items()
    }:
        return float("inf")
    worst = 0.0
    for name, tensor in expected.tensors.items():
        apart = float((found.tensors[name].double() - tensor.double()).norm())
        size = float(tensor.double().norm())
        relative = apart / size if size else float("inf") if apart else 0.0
        worst = max(worst, relative) if relative == relative else float("inf")
    return worst


def same_bits(found: Result, expected: Result) -> bool:
    """Whether the files are the same, byte for byte."""
    return found.hashes == expected.hashes


def judge(name: str, found: Result) -> tuple[bool, str]:
    """Whether a case's result is the one it was, as far as this machine can tell, and in words."""
    wrote, results = kept()
    kind = CASES[name].like or name
    expected = results.get(kind)
    if expected is None:
        return False, "no values are kept: python -m tests.golden write"
    if same_bits(found, expected):
        return True, "same bits"
    apart, here = difference(found, expected), machine()
    said = "other bytes of the same values" if apart == 0 else ""
    said = said or f"largest relative difference {apart:.1e}"
    if here == wrote:
        return False, f"{said}, on the same kind of machine"
    other = ", ".join(
        f"{here[key]} for {wrote[key]}" for key in here if here[key] != wrote.get(key)
    )
    allowed = COARSE.get(kind, TOLERANCE)
    return apart <= allowed, f"{said} of {allowed:.0e} allowed ({other})"


def _everything(names: list[str], folder: Path) -> Iterator[tuple[str, Result]]:
    place = make_place(folder / "place")
    for name in names:
        yield name, run(CASES[name], place, folder / name)


def write() -> int:
    """Run all cases and keep what they leave. 1 if one does not end as the one it is like."""
    hashes: dict[str, dict[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, found in _everything(list(CASES), Path(folder)):
            like = CASES[name].like
            if like is not None:
                if found.hashes != hashes[like]:
                    print(f"{name} does not end as {like}: nothing is written")
                    return 1
                continue
            hashes[name] = found.hashes
            tensors |= {f"{name}/{key}": tensor for key, tensor in found.tensors.items()}
    KEPT.mkdir(exist_ok=True)
    save_file(tensors, KEPT / "adapters.safetensors")
    notes = json.dumps({"machine": machine(), "cases": hashes}, indent=1)
    (KEPT / "golden.json").write_text(notes + "\n")
    return 0


def check(names: list[str]) -> int:
    """Run these cases and say of each how it compares. 1 if one is not what it was."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, found in _everything(names, Path(folder)):
            good, said = judge(name, found)
            failed += not good
            print(f"{name:24} {'' if good else 'DIFFERS: '}{said}", flush=True)
    print(f"{len(names) - failed} of {len(names)} are what they were")
    return int(failed > 0)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("do", choices=["write", "check"])
    parser.add_argument("case", nargs="*", help="of check; left out: all")
    words = parser.parse_args()
    if unknown := [name for name in words.case if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return write() if words.do == "write" else check(words.case or list(CASES))


if __name__ == "__main__":
    sys.exit(main())
