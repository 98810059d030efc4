"""Runs across sites: what a round takes beside Flower's own deployment, and what is on the wire.

Seconds: three sites on this machine, TLS and node keys, the same rows, batches and model. rolora as
``rolora run --on`` runs it, Flower's SuperLink and SuperNodes as they come, and the sites' training
alone, in a process each with nothing between them.

Bytes: a tap (benchmarks/wiretap.py) between the sites and the SuperLink: rolora and Flower with
MiniLM, and rolora with a random model whose adapter has the shape of RoBERTa-Large's. Nothing is
timed there.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks import harness
from benchmarks.benches.whole_job import apart
from benchmarks.harness import Party, Running
from benchmarks.job import configuration, lengthened, write_job
from benchmarks.place import Place
from benchmarks.site_bytes import added_up, message_bodies, sorted_out
from benchmarks.wiretap import Exchange, Tap
from rolora.config.load import load_config
from rolora.files import write_file
from rolora.sites.folder import FederationFolder
from rolora.sites.keys import LOOPBACK
from rolora.sites.local_trial import make_trial
from rolora.sites.node import IDLE_LONGEST

SITES = 3
STEPS, TOKENS, BATCH = 20, 32, 4
HEARTBEAT = 20.0  # seconds between two, in the mean: Flower's 30, less its margin


def run(place: Place) -> None:
    """Seconds, then bytes."""
    measure_seconds(place)
    count_bytes(place)


def measure_seconds(place: Place) -> None:
    """Rounds of the three parties, in turns; in the end they have the same adapter."""
    ours, theirs, repetitions = (1, 1, 2) if place.quick else (6, 2, 3)
    rounds = ours + 2
    folder = federation(place, "seconds", place.model(), rounds, STEPS, TOKENS)
    job = place.scratch / "seconds-job"
    most = max(rounds, theirs * (repetitions + 1))
    write_job(load_config(folder / "run.toml"), job, most, threads=place.threads, actors=1)
    bare = bare_federation(place, "seconds-flower", folder)
    adapters = [job / f"{name}.safetensors" for name in ("rolora", "flower")]
    flower = (job, bare.path, bare.port, theirs, adapters[1], rounds)
    place.measured(
        "across-sites-seconds",
        [
            place.party("rolora_alone", folder, ours, name="training alone"),
            place.party("rolora_sites", folder, ours, adapters[0], name="rolora"),
            place.party("flower_sites", *flower, name="Flower"),
        ],
        repetitions,
        check=lambda: {"apart": apart(adapters[1], adapters[0], job / "start.safetensors")},
        sites=SITES,
        steps=STEPS,
        tokens=TOKENS * BATCH,
    )


def federation(place: Place, name: str, model: Path, rounds: int, steps: int, tokens: int) -> Path:
    """A folder with keys, the sites' rows and ``run.toml``; rows have equally many tokens."""
    train, _ = place.questions()
    config = configuration(
        model,
        lengthened(train, place.scratch / f"{name}.csv", tokens // 4, 64 * SITES),
        lengthened(train, place.scratch / f"{name}-test.csv", tokens // 4, 16),
        max_length=tokens,
        clients=SITES,
        rounds=rounds,
        local_steps=steps,
        batch_size=BATCH,
        eval={"every": rounds},
    )
    file, folder = place.scratch / f"{name}.toml", place.scratch / name
    write_file(file, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    make_trial(folder, str(file), (), SITES, free_ports(2))
    return folder


def bare_federation(place: Place, name: str, like: Path) -> FederationFolder:
    """Keys for sites of the same names, and ports for their SuperNodes after its own.

    Flower's own SuperLink is controlled on the port that it has for sites.
    """
    folder = FederationFolder.create(place.scratch / name, LOOPBACK[0], free_ports(1 + SITES))
    settings = folder.path / "flwr" / "config.toml"
    settings.write_text(settings.read_text().replace(f":{folder.control}", f":{folder.port}"))
    for site in FederationFolder.open(like).public:
        folder.add_site(site)
    return folder


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nothing listens on now."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
        try:
            for following in range(port, port + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", following))
        except (OSError, OverflowError):
            continue
        return port


def count_bytes(place: Place) -> None:
    """Per site and round, in the mean over all rounds but the first and the last."""
    rounds = 2 if place.quick else 4
    small = counted(place, "MiniLM", place.model(), rounds)
    record = {
        "bench": "across-sites-bytes",
        "setting": {"sites": SITES, "rounds": rounds, "rank": 4, "quick": place.quick},
        "machine": {**harness.machine(), "versions": dict(place.versions)},
        "rows": [
            small,
            counted(place, "RoBERTa-Large's shape", large(place), rounds),
            counted_bare(place, "MiniLM", rounds),
        ],
        "idle": {"looks": IDLE_LONGEST, "heartbeats": HEARTBEAT},  # seconds between two
    }
    write_file(place.records / "across-sites-bytes.json", json.dumps(record, indent=1) + "\n")


def large(place: Place) -> Path:
    """A random BERT with RoBERTa-Large's width and layers, whose feed-forward layers are tiny.

    Adapters on query and value see no difference; it is a third of the size.
    """
    folder = place.scratch / "large"
    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=16
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(place.model()).save_pretrained(folder)
    return folder


def counted(place: Place, name: str, model: Path, rounds: int) -> Mapping[str, Any]:
    """Bytes of ``rolora run --on``."""
    folder = federation(place, f"bytes-{model.name}", model, rounds + 2, steps=1, tokens=8)
    opened = FederationFolder.open(folder)
    with Tap(folder, opened.port) as tap:
        for site in opened.public:
            file = folder / "sites" / site / "site.toml"
            file.write_text(file.read_text().replace(f":{opened.port}", f":{tap.port}"))
        adapter = place.scratch / f"{model.name}.safetensors"
        party = place.party("rolora_sites", folder, rounds, adapter)
        passed = tap.between(*asked(party, place.environment(), "prepare", "run", "after")["clock"])
        sizes = elements(adapter)
        bodies = message_bodies(passed)
    row = added_up(passed, SITES * rounds)
    if sizes["lora_A"] != sizes["lora_B"]:
        raise ValueError("the two factors differ in size")
    one_factor = 4 * (sizes["lora_B"] + sizes["head"])
    row["question"] |= {"payload": one_factor, "body": mean(bodies["down"])}
    row["answer"] |= {"payload": one_factor, "body": mean(bodies["up"])}
    return {"party": "rolora", "adapter": name, **row, **small_change(tap.exchanges)}


def counted_bare(place: Place, name: str, rounds: int) -> Mapping[str, Any]:
    """Bytes of Flower's own deployment, which sends the whole adapter down and a factor up."""
    folder = federation(place, "bytes-bare", place.model(), 2 * rounds, steps=1, tokens=8)
    job = place.scratch / "bytes-job"
    write_job(load_config(folder / "run.toml"), job, 2 * rounds, threads=place.threads, actors=1)
    bare = bare_federation(place, "bytes-flower", folder)
    with Tap(bare.path, bare.port) as tap:
        adapter = job / "flower.safetensors"
        party = place.party("flower_sites", job, bare.path, tap.port, rounds, adapter, rounds)
        # in the first rounds SuperNodes also fetch the application
        passed = tap.between(*asked(party, place.environment(), "run", "run")["clock"])
        sizes = elements(adapter)
    row = added_up(passed, SITES * rounds)
    row["question"] |= {"payload": 4 * sum(sizes.values()), "body": None}
    row["answer"] |= {"payload": 4 * (sizes["lora_B"] + sizes["head"]), "body": None}
    return {"party": "Flower", "adapter": name, **row, **small_change(tap.exchanges)}


def asked(party: Party, environment: Mapping[str, str], *requests: str) -> Mapping[str, Any]:
    """What a party answers to "run", the last time; nothing is timed."""
    answer: Mapping[str, Any] = {}
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        running = Running(party, environment, log)
        try:
            running.answer()
            for what in requests:
                said = running.ask(what)
                answer = said if what == "run" else answer
        finally:
            running.stop()
    return answer


def small_change(exchanges: Sequence[Exchange]) -> Mapping[str, float]:
    """Bytes, both ways, of one look for a question and of one heartbeat, on an open connection."""
    known = [one for one in exchanges if "messages" in one.path or "heartbeat" in one.path]
    kinds = sorted_out([one for one in known if not one.first])
    return {
        kind: mean([one.stream_up + one.stream_down for one in kinds[kind]] or [0])
        for kind in ("looks", "heartbeats")
    }


def elements(adapter: Path) -> Mapping[str, int]:
    """How many an adapter file has, by "lora_A", "lora_B" and "head"."""
    found = {"lora_A": 0, "lora_B": 0, "head": 0}
    for name, tensor in load_file(adapter).items():
        kind = next((factor for factor in ("lora_A", "lora_B") if factor in name), "head")
        found[kind] += tensor.numel()
    return found
