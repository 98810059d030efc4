"""Records to Markdown tables. Every number on docs/performance.md is computed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.statistics import interval, ratio

Record = Mapping[str, Any]


def page(folder: Path) -> str:
    """All tables of a folder of records, each under its record's name."""
    return "\n".join(f"\n## {name}\n\n{text}" for name, text in blocks(folder).items())


def blocks(folder: Path) -> dict[str, str]:
    """Record name -> its table, and under it where and when it was measured."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        if "bench" not in record:
            continue
        kind = next(kind for kind in KINDS if record["bench"].startswith(kind))
        found[file.stem] = f"{KINDS[kind](record)}\n\n{circumstances(record)}"
    return found


def circumstances(record: Record) -> str:
    """Machine, threads, load and versions, in one paragraph."""
    machine, setting = record["machine"], record["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parties = record.get("parties", {}).values()
    loads = [sample["load"] for party in parties for sample in party["samples"]]
    load = f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    threads = f", threads per process: {setting['threads']}" if "threads" in setting else ""
    quick = " **Quick run: these numbers mean nothing.**" if setting["quick"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{threads}{load}; Python {machine['python']}; "
        f"{versions}.{quick}"
    )


def overhead(record: Record) -> str:
    """Time per client step, and eta against the raw loop, with its interval."""
    rows = []
    for name, party in record["parties"].items():
        start = [f"{party['cold_seconds']:.1f}", _seconds(party["first"])]
        rows.append([name, *_times(party), *_against(record, "raw_loop", name), *start])
    head = ["party", "ms a client step", "CPU ms", "eta (wall)", "95 %", "eta (CPU)", "n"]
    return _table([*head, "s to get ready", "s first run"], rows)


def clients(record: Record) -> str:
    """Time and memory by number of clients."""
    rows = []
    for name, party in record["parties"].items():
        peak = held = "failed"
        if party["samples"]:
            peak = f"{_median(party, lambda s: s['peak_kib']) / 1024:.0f}"
            held = f"{_median(party, lambda s: s['answer']['held_kib']) / 1024:.0f}"
        rows.append([name, *_times(party), peak, held])
    head = ["party", "ms a client step", "CPU ms", "peak anonymous MiB", "held MiB"]
    return _table(head, rows)


def traffic(record: Record) -> str:
    """Bytes per client and round."""
    rows = [
        [
            f"`{row['method']}`",
            str(row["round"]),
            f"{row['up']:,.0f}",
            f"{row['up_expected']:,}",
            f"{row['down']:,.0f}",
            f"{row['safetensors']:,} (+{row['safetensors'] / row['up'] - 1:.1%})",
        ]
        for row in record["rows"]
    ]
    head = ["method", "round", "bytes up", "elements × 4", "bytes down", "as safetensors"]
    return _table(head, rows)


def aggregation(record: Record) -> str:
    """GB of updates a second, and the share of the memory's read speed."""
    rows = []
    for name, party in record["parties"].items():
        speed = _speed(party)
        rows.append([f"`{name}`", speed, *_against(record, "read", name)])
    return _table(["way", "GB/s", "of read speed", "95 %", "by CPU time", "n"], rows)


def serialisation(record: Record) -> str:
    """MB of adapter a second, and bytes beside the payload."""
    rows = []
    for name, party in record["parties"].items():
        extra = "failed"
        if party["samples"]:
            answer = party["samples"][0]["answer"]
            extra = f"{answer['bytes'] - answer['payload']:,}"
        against = _against(record, "safetensors_bytes", name)
        rows.append([f"`{name}`", _speed(party), *against, extra])
    head = ["format", "MB/s", "against safetensors", "95 %", "by CPU time", "n", "extra bytes"]
    return _table(head, rows)


def whole_job(record: Record) -> str:
    """Seconds of the job, and to the accuracy that every party reached."""
    parties = record["parties"]
    curves = [p["samples"][-1]["answer"]["curve"] for p in parties.values() if p["samples"]]
    target = min((max(value for _, value in curve) for curve in curves), default=0.0)
    rows = []
    for name, party in parties.items():
        apart = record["setting"]["apart"].get(name)
        against = _against(record, name, "rolora")[:2]
        cells = ["failed"] * 4
        if party["samples"]:
            reached = [_first_at(s["answer"]["curve"], target) for s in party["samples"]]
            final = party["samples"][-1]["answer"]["curve"][-1][1]
            cells = [
                f"{_median(party, lambda s: s['seconds']):.1f}",
                f"{_median(party, lambda s: s['cpu_seconds']):.1f}",
                f"{median(reached):.1f}",
                f"{final:.3f}",
            ]
        distance = "-" if apart is None else f"{apart:.1e}"
        rows.append([name, *cells, *against, f"{party['cold_seconds']:.1f}", distance])
    head = ["party", "s a job", "CPU s", f"s to accuracy {target:.3f}", "accuracy at the end"]
    return _table([*head, "time / rolora's", "95 %", "s to get ready", "adapter apart"], rows)


def client_step(record: Record) -> str:
    """Time per client step, and against the limit."""
    rows = []
    for name, party in record["parties"].items():
        wall, low_high, cpu, pairs = _against(record, name, "limit")
        rows.append([name, *_times(party), wall, low_high, cpu, pairs])
    head = ["party", "ms a client step", "CPU ms", "over the limit (wall)", "95 %", "(CPU)", "n"]
    return _table(head, rows)


def dtypes(record: Record) -> str:
    """Time per client step, and how many times as fast as in float32."""
    rows = [[n, *_times(p), *_against(record, "float32", n)] for n, p in record["parties"].items()]
    head = ["base in", "ms a client step", "CPU ms", "speed (wall)", "95 %", "(CPU)", "n"]
    return _table(head, rows)


def operators(record: Record) -> str:
    """Milliseconds of a client step by kind of operator, and their share of all."""

    def spent(party: Record, kind: str) -> float:
        answers = [sample["answer"] for sample in party["samples"]]
        return float(median(one["operators"][kind] / one["units"] for one in answers))

    parties = {name: party for name, party in record["parties"].items() if party["samples"]}
    kinds = [*next(iter(parties.values()))["samples"][0]["answer"]["operators"]] if parties else []
    rows = []
    for kind in kinds:
        each = [(spent(p, kind), sum(spent(p, one) for one in kinds)) for p in parties.values()]
        rows.append([kind, *(cell for t, all in each for cell in (f"{t:.2f}", f"{t / all:.0%}"))])
    head = [cell for name in parties for cell in (f"ms, {name}", "share")]
    return _table(["operators", *head], rows)


def saving(record: Record) -> str:
    """How many times as fast the second party is as the first, and the share of the ideal."""
    (slow, fast), ideal = record["parties"], record["setting"]["ideal"]
    wall, low_high, cpu, pairs = _against(record, slow, fast)
    share = f"{float(cpu) / ideal:.2f}" if cpu not in ("", "-") else "-"
    times = [_times(record["parties"][name])[0] for name in (slow, fast)]
    head = [f"ms, {slow}", f"ms, {fast}", "ratio (wall)", "95 %", "ratio (CPU)", "ideal"]
    cells = [*times, wall, low_high, cpu, f"{ideal:.2f}", share, pairs]
    return _table([*head, "CPU ratio / ideal", "n"], [cells])


def workers(record: Record) -> str:
    """Time and memory of one process and of several."""
    first, rows = next(iter(record["parties"])), []
    for name, party in record["parties"].items():
        peak = "failed"
        if party["samples"]:
            peak = f"{_median(party, lambda s: s['peak_kib']) / 1024:.0f}"
        rows.append([name, *_times(party), *_against(record, first, name), peak])
    head = ["party", "ms a client step", "CPU ms", "ratio (wall)", "95 %", "ratio (CPU)", "n"]
    return _table([*head, "peak anonymous MiB"], rows)


def site_seconds(record: Record) -> str:
    """Seconds a round, beyond the training alone, and against Flower's deployment."""
    rows, parties = [], record["parties"]
    usual = {name: [one["seconds"] for one in _rounds(p)] for name, p in parties.items()}
    alone = next(iter(parties))
    for name, party in parties.items():
        if not (seconds := usual[name]):
            rows.append([name, f"failed: {party['failed']}", *[""] * 6])
            continue
        loading = [one["loading"] for one in _rounds(party) if "loading" in one]
        rows.append(
            [
                name,
                f"{median(seconds):.2f}",
                f"{min(seconds):.2f} to {max(seconds):.2f}",
                f"{median(seconds) - median(usual[alone]):.2f}" if usual[alone] else "",
                f"{median(loading):.2f}" if loading else "-",
                f"{median(seconds) / median(usual['Flower']):.2f}" if usual["Flower"] else "",
                f"{_median(party, lambda s: s['cpu_seconds'] / s['answer']['units']):.2f}",
                str(len(seconds)),
            ]
        )
    head = ["party", "s a round", "least to most", f"more than {alone}", "of that, loading"]
    return _table([*head, "time / Flower's", "CPU s a round", "rounds"], rows)


def site_bytes(record: Record) -> str:
    """Bytes of a message by layer; what a site moves in a round; what it moves when idle."""
    messages, rounds = [], []
    for row in record["rows"]:
        name = f"{row['party']}, {row['adapter']}"
        for kind in ("question", "answer"):
            sizes = row[kind]
            layers = [
                f"{sizes[layer]:,.0f} ({sizes[layer] / sizes['payload'] - 1:+.1%})"
                if sizes[layer]
                else "-"
                for layer in ("body", "message", "stream")
            ]
            messages.append([name, kind, f"{sizes['payload']:,}", *layers])
        both = row["question"]["payload"] + row["answer"]["payload"]
        counts = [f"{row[f'{key}_a_round']:.1f}" for key in ("looks", "heartbeats", "connections")]
        each = [f"{row[key]:,.0f}" for key in ("looks", "heartbeats")]
        whole = f"{row['all']:,.0f} ({row['all'] / both - 1:+.1%})"
        rounds.append([name, f"{both:,}", whole, *counts, *each])
    head = ["run", "message", "elements × 4", "payload", "with envelope", "with HTTP and TLS"]
    more = ["run", "elements × 4, both ways", "all on TCP", "looks", "heartbeats", "connections"]
    tables = [_table(head, messages), _table([*more, "bytes a look", "a heartbeat"], rounds)]
    idle, ours = record["idle"], record["rows"][0]
    hour = sum(3600 / idle[key] * ours[key] for key in ("looks", "heartbeats"))
    tables.append(f"A site that waits for a run moves {hour / 1e6:.1f} MB an hour, both ways.")
    return "\n\n".join(tables)


KINDS: dict[str, Callable[[Record], str]] = {
    "overhead": overhead,
    "clients": clients,
    "traffic": traffic,
    "aggregation": aggregation,
    "serialisation": serialisation,
    "whole-job": whole_job,
    "client-step": client_step,
    "bfloat16": dtypes,
    "operators": operators,
    "padding": saving,
    "prefix-cache": saving,
    "workers": workers,
    "across-sites-seconds": site_seconds,
    "across-sites-bytes": site_bytes,
}


def _rounds(party: Record) -> list[Mapping[str, float]]:
    """Every measured round of a party that measures its rounds itself."""
    return [one for sample in party["samples"] for one in sample["answer"]["rounds"]]


def _first_at(curve: Sequence[tuple[float, float]], target: float) -> float:
    return next((seconds for seconds, value in curve if value >= target), float("inf"))


def _median(party: Record, what: Callable[[Any], float]) -> float:
    return median(what(sample) for sample in party["samples"])


def _seconds(sample: Record | None) -> str:
    return "failed" if sample is None else f"{sample['seconds']:.1f}"


def _times(party: Record) -> list[str]:
    """Median wall and CPU milliseconds a unit."""
    if not party["samples"]:
        return [f"failed: {party['failed']}", ""]
    wall = _median(party, lambda sample: sample["seconds"] / sample["answer"]["units"])
    cpu = _median(party, lambda sample: sample["cpu_seconds"] / sample["answer"]["units"])
    return [f"{1000 * wall:.2f}", f"{1000 * cpu:.2f}"]


def _speed(party: Record) -> str:
    if not party["samples"]:
        return f"failed: {party['failed']}"
    return f"{_median(party, lambda s: s['answer']['units'] / s['seconds']):,.2f}"


def _against(record: Record, reference: str, name: str) -> list[str]:
    """Time of the reference / time of the party, per unit: wall, its interval, CPU, pairs."""
    samples = [
        {sample["repetition"]: sample for sample in record["parties"][one]["samples"]}
        for one in (reference, name)
    ]
    both = sorted(samples[0].keys() & samples[1].keys())
    if not both:
        return ["", "", "", "0"]

    def pairs(key: str) -> list[tuple[float, float]]:
        first, second = ([one[i][key] / one[i]["answer"]["units"] for i in both] for one in samples)
        return list(zip(first, second, strict=True))

    wall, cpu = pairs("seconds"), pairs("cpu_seconds")
    low, high = interval(wall)
    by_cpu = f"{ratio(cpu):.2f}" if all(second > 0 for _, second in cpu) else "-"
    return [f"{ratio(wall):.2f}", f"{low:.2f} to {high:.2f}", by_cpu, str(len(both))]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
