"""Write the tables of docs/scale.md from the measured constants: python docs/make_scale.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import put

from rolora.files import write_file

PAGE = Path(__file__).with_name("scale.md")
RECORD = Path(__file__).parent.parent / "benchmarks" / "records" / "server_constants.json"
NAMES = {
    "minilm": "MiniLM, q and v, r = 4, head",
    "roberta_large": "RoBERTa-Large, q and v, r = 4",
    "llama_2_7b": "Llama-2-7B, q and v, r = 8",
}
CLIENTS, COHORT, LEAVES = 1_000_000, 1_000, 10
CARDS, EFFICIENCY = 8, 0.9


def measured(record: dict[str, Any]) -> list[str]:
    """Server time per update and per round."""
    lines = [
        "| adapter | method | MB up = down, a client | ms an update | ms a round "
        "| checkpoint, ms |",
        "|---|---|---|---|---|---|",
    ]
    for shape, adapter in record["adapters"].items():
        for method, cost in adapter["methods"].items():
            if method == "fedit":  # the error's cost is not linear in the cohort
                each = f"{cost['round_seconds'] * 1e3 / cost['cohort']:.2f} (of {cost['cohort']})"
                whole = "included"
            else:
                each = f"{cost['seconds_per_update'] * 1e3:.2f}"
                whole = f"{cost['seconds_per_round'] * 1e3:.0f}"
            lines.append(
                f"| {NAMES[shape]} | `{method}` | {cost['bytes_up'] / 1e6:.2f} | {each} | {whole} "
                f"| {cost['checkpoint_seconds'] * 1e3:.0f} |"
            )
    return lines


def summing(record: dict[str, Any]) -> list[str]:
    """How fast updates go into a running sum."""
    reading = record["machine"]["read_bytes_per_second"]
    lines = [
        f"| adapter | float32 sum, GB/s | share of memory read, {reading / 1e9:.1f} GB/s "
        "| float64 sum, GB/s | share |",
        "|---|---|---|---|---|",
    ]
    for shape, speed in record["summing"].items():
        single, double = speed["float32"], speed["float64"]
        lines.append(
            f"| {NAMES[shape]} | {single / 1e9:.1f} | {single / reading:.2f} "
            f"| {double / 1e9:.1f} | {double / reading:.2f} |"
        )
    return lines


def waiting(record: dict[str, Any]) -> list[str]:
    """A round of ten clients out of more and more."""
    lines = [
        "| clients in all | server ms a round of 10 | of it drawing the cohort | manifest after "
        "20 rounds, bytes | bytes for each client that took part |",
        "|---|---|---|---|---|",
    ]
    for row in record["waiting"]:
        grown = row["manifest_bytes_per_client_that_took_part"]
        lines.append(
            f"| {row['clients']:,} | {row['round_seconds'] * 1e3:.1f} "
            f"| {row['draw_seconds'] * 1e3:.2f} | {row['manifest_bytes']:,} "
            f"| {f'{grown:.0f}' if row['clients'] > 10 else 'all take part'} |"
        )
    return lines


def paper(record: dict[str, Any]) -> list[str]:
    """A round with a million clients, computed from the constants."""
    lines = [
        f"| adapter | method | GB up = down, a round | one server, s | {LEAVES} leaves, s each "
        "| MB from a leaf to the root |",
        "|---|---|---|---|---|---|",
    ]
    for shape, adapter in record["adapters"].items():
        for method, cost in adapter["methods"].items():
            traffic = cost["bytes_up"] * COHORT / 1e9
            partial_sum = 2 * cost["bytes_up"] / 1e6  # float64
            one = leaf = "not known"
            if method != "fedit":
                seconds = cost["seconds_per_update"] * COHORT
                one = f"{seconds + cost['seconds_per_round'] + cost['checkpoint_seconds']:.1f}"
                leaf = f"{seconds / LEAVES:.2f}"
            lines.append(
                f"| {NAMES[shape]} | `{method}` | {traffic:.2f} | {one} | {leaf} "
                f"| {partial_sum:.1f} |"
            )
    return lines


def cards(record: dict[str, Any]) -> list[str]:
    """What the server's serial work leaves of the speed of several cards."""
    few, *_, many = (row["round_seconds"] for row in record["waiting"])
    wanted = EFFICIENCY * CARDS
    lines = [
        "| adapter | method | server, s a round | 0.01 s a client | 0.1 s | 1 s "
        f"| {wanted:.1f} times from, s a client |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, adapter in record["adapters"].items():
        for method, cost in adapter["methods"].items():
            if method == "fedit":
                continue
            serial = cost["seconds_per_update"] * COHORT + cost["seconds_per_round"]
            serial += cost["checkpoint_seconds"] + many - few
            times = [
                (COHORT * each + serial) / (COHORT * each / CARDS + serial)
                for each in (0.01, 0.1, 1.0)
            ]
            least = serial * (1 - 1 / wanted) / (1 / wanted - 1 / CARDS) / COHORT
            cells = " | ".join(f"{speed:.1f}" for speed in times)
            lines.append(f"| {NAMES[shape]} | `{method}` | {serial:.2f} | {cells} | {least:.3f} |")
    return lines


TABLES = {
    "measured": measured,
    "summing": summing,
    "waiting": waiting,
    "paper": paper,
    "cards": cards,
}


def page(text: str, record: dict[str, Any]) -> str:
    """The page with every table between its marks rewritten."""
    for name, table in TABLES.items():
        text = put(text, f"scale:{name}", table(record))
    return text


if __name__ == "__main__":
    write_file(PAGE, page(PAGE.read_text(), json.loads(RECORD.read_text())))
