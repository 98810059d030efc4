"""Writes the tables of docs/robustness.md from the records of the attack studies.

python experiments/run_attacks.py
python docs/make_robustness.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import put

from rolora.files import write_file

HERE = Path(__file__).parent
PAGE = HERE / "robustness.md"
RECORDS = HERE.parent / "experiments" / "records" / "attacks"

Record = Mapping[str, Any]


def percent(value: float) -> str:
    """'86.9', from a fraction."""
    return f"{100 * value:.1f}"


def accuracy(cell: Record) -> str:
    """'86.9 ± 0.4', or how many of the runs diverged."""
    if cell["mean"] is None:
        return f"{cell['values'].count(None)} of {len(cell['values'])} diverged"
    return f"{percent(cell['mean'])} ± {percent(cell['sd'])}"


def signed(value: float | None, interval: list[float] | None) -> str:
    """'−2.1 [−3.0, −1.2]': points and their interval."""
    if value is None:
        return ""
    words = [f"{100 * x:+.1f}" for x in (value, *(interval or ()))]
    text = words[0] + (f" [{words[1]}, {words[2]}]" if len(words) > 1 else "")
    return text.replace("-", "−")


def name(label: str) -> str:
    """An attack without its options."""
    return label.partition("+")[0]


def matrix(record: Record) -> list[str]:
    """A table for each rule: attacks down, methods across."""
    lines = []
    for rule in record["rules"]:
        lines += [f"Rule `{rule}`:", ""]
        lines += ["| attack | " + " | ".join(f"`{m}`" for m in record["methods"]) + " |"]
        lines += ["|---" + "|---:" * len(record["methods"]) + "|"]
        for attack in dict.fromkeys(cell["attack"] for cell in record["cells"]):
            own = [c for c in record["cells"] if (c["attack"], c["rule"]) == (attack, rule)]
            values = " | ".join(accuracy(cell) for cell in own)
            lines.append(f"| {name(attack)} | {values} |")
        lines.append("")
    return [*lines, setting(record)]


def success(record: Record) -> list[str]:
    """How often the backdoor worked."""
    lines = ["| rule | " + " | ".join(f"`{m}`" for m in record["methods"]) + " |"]
    lines += ["|---" + "|---:" * len(record["methods"]) + "|"]
    for rule in record["rules"]:
        own = [c for c in record["cells"] if c["rule"] == rule and c["success"] is not None]
        lines.append(f"| `{rule}` | " + " | ".join(percent(c["success"]) for c in own) + " |")
    return lines


def standings(record: Record) -> list[str]:
    """Over all attacks: what each method lost, and how it stands beside the first."""
    first = record["methods"][0]
    lines = [f"| rule | method | lost, points | minus `{first}`, points | worst | left out |"]
    lines += ["|---|---|---:|---:|---|---|"]
    for one in record["standings"]:
        lost = "" if one["lost"] is None else f"{100 * one['lost']:.1f}"
        beside = "" if one["method"] == first else signed(one["beside"], one["interval"])
        gone = ", ".join(map(name, one["left_out"]))
        line = [f"`{one['rule']}`", f"`{one['method']}`", lost, beside, name(one["worst"]), gone]
        lines.append(f"| {' | '.join(line)} |")
    return lines


def cost(record: Record) -> list[str]:
    """Each rule against the mean where nobody attacks."""
    cells = {(c["rule"], c["method"]): c for c in record["cells"]}
    lines = ["| rule | " + " | ".join(f"`{m}`" for m in record["methods"]) + " |"]
    lines += ["|---" + "|---:" * len(record["methods"]) + "|"]
    for rule in record["rules"]:
        own = (cells[rule, method] for method in record["methods"])
        lines.append(f"| `{rule}` | " + " | ".join(accuracy(c) for c in own) + " |")
    return [*lines, "", setting(record)]


def setting(record: Record) -> str:
    """The setting of a table, in a line."""
    seeds, made = ", ".join(map(str, record["seeds"])), record["made"]
    return (
        f"Accuracy, %, mean ± standard deviation over seeds {seeds}: "
        f"`python experiments/run_attacks.py {record['study']}`, {record['core_hours']:.2f} "
        f"core-hours ({made['cpu']})."
    )


def read_records() -> dict[str, Record]:
    """All records, by study."""
    found = sorted(RECORDS.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}


def page(text: str, records: Mapping[str, Record]) -> str:
    """The page with its tables made anew."""
    text = put(text, "attacks:mnist", matrix(records["mnist"]))
    text = put(text, "attacks:success", success(records["mnist"]))
    text = put(text, "attacks:standings", standings(records["mnist"]))
    return put(text, "attacks:cost", cost(records["mnist-cost"]))


if __name__ == "__main__":
    write_file(PAGE, page(PAGE.read_text(encoding="utf-8"), read_records()))
