"""The other tables: the split, training masks, methods, plans, and what can be fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rolora.cli.printing import table
from rolora.data.labels import in_order
from rolora.errors import printable

if TYPE_CHECKING:
    from rolora.demo.sources import Source
    from rolora.plan.method_table import MethodRow
    from rolora.plan.needs import MethodPlan, Plan

METHODS_LEGEND = """\
A, B   lora_A and lora_B ("B, A": alternating); the task head goes with them
Δ      a change of the base weights, stored separately
keeps  what a client trains and never sends
exact  the server's product is the mean of the clients' products
ranks  clients may have different ranks
sums   the server needs only the sum of the updates

For everything, including the options' defaults: rolora methods --json"""


def split_table(split: Mapping[str, Any], test_rows: int) -> Group:
    """The rows of each client, and of each label if there are at most 12 labels."""
    clients = split["clients"]
    labels = in_order(label for client in clients for label in client["labels"])
    shown = labels if len(labels) <= 12 else []
    rows = [
        [c["id"], str(c["num_examples"]), *(str(c["labels"].get(label, "")) for label in shown)]
        for c in clients
    ]
    total = sum(client["num_examples"] for client in clients)
    note = f"\nnote: {split['note']}" if split["note"] else ""
    summary = f"\n{total} training rows, {test_rows} test rows{note}"
    return Group(table(["client", "rows", *shown], rows), summary)


def masked_text(rows: Iterable[Mapping[str, Sequence[tuple[str, bool]]]]) -> Text:
    """Each row in pieces; those that are trained on are between ⟦ and ⟧."""
    text = Text()
    for number, row in enumerate(rows, start=1):
        text.append(f"\nrow {number}; the text between ⟦ and ⟧ is trained on:\n")
        for name, pieces in row.items():
            text.append(f"{name}: " if len(row) > 1 else "")
            for piece, trained in pieces:
                piece = printable(piece, keep="\n\t")
                text.append(*((f"⟦{piece}⟧", "bold green") if trained else (piece, "dim")))
            text.append("\n")
    text.rstrip()
    return text


def methods_table(rows: Sequence[MethodRow]) -> Group:
    """What each method trains and sends, what it supports, and its paper."""
    cells = []
    for row in rows:
        sends = row.up != ("nothing", "nothing")
        cells.append(
            [
                row.name,
                roles_cell(row.trains),
                roles_cell(row.up),
                roles_cell(row.down),
                roles_cell((row.keeps, row.keeps)),
                yes_or_no(row.exact),
                yes_or_no(row.ranks if sends else None),
                yes_or_no(row.secure if sends else None),
                ", ".join(option.partition("=")[0] for option in row.options),
                row.paper.removeprefix("arXiv:"),
            ]
        )
    head = ["method", "trains", "up", "down", "keeps", "exact", "ranks", "sums", "options", "arXiv"]
    made = table(head, cells, align="l")
    made.collapse_padding = True
    return Group(made, f"\n{METHODS_LEGEND}")


def roles_cell(rounds: tuple[str, str]) -> str:
    """Parts of the adapter, or two that alternate; Δ is the delta."""
    return ", ".join(dict.fromkeys(rounds)).replace("delta", "Δ").replace("nothing", "–")


def yes_or_no(value: bool | None) -> str:
    """A fact; a dash if it does not apply."""
    return "–" if value is None else "yes" if value else "no"


def sources_table(sources: Mapping[str, Source]) -> Table:
    """What can be fetched, from which package, and how many megabytes that has."""
    rows = [
        [name, str(one.megabytes), f"{source.what}; from {one.client}: {one.name} {one.version}"]
        for name, source in sources.items()
        for one in [source.package]
    ]
    return table(["name", "MB", "what it is, and its package"], rows, align="lrl")


def plan_text(plan: Plan) -> Group:
    """A plan: the model and the clients, then each kind of round, then the whole run."""
    part = "all" if plan.cohort == plan.clients else f"{plan.cohort}"
    steps = "an unknown number of steps" if plan.steps is None else f"{plan.steps:,.4g} steps"
    rows = "" if plan.rows is None else f" with {plan.rows:,} rows"
    summary = (
        f"model      {plan.model}, {_short(plan.parameters)} parameters in {plan.dtype}: "
        f"{_bytes(plan.weights)} in memory, {_bytes(plan.stored)} on disk "
        f"(configuration from {plan.source})\n"
        f"clients    {plan.clients}{rows}, {part} in each of {plan.rounds} rounds, "
        f"{steps} of about {plan.tokens:,} tokens\n"
        f"cache      {_bytes(plan.cache)} for layers below the adapters\n"
    )
    rounds = [each for method in plan.methods for each in method.rounds]
    head = [f"{method.name}: {each.factors}" for method in plan.methods for each in method.rounds]
    lines = {
        "parameters trained": [f"{each.trained:,}" for each in rounds],
        "one client sends": [_bytes(each.up) for each in rounds],
        "one client receives": [_bytes(each.down) for each in rounds],
        "one client's step, FLOPs": [_short(each.flops) for each in rounds],
        "activations kept": [_bytes(each.activations) for each in rounds],
        "optimiser state": [_bytes(each.optimizer) for each in rounds],
        "memory at the peak": [_bytes(each.peak) for each in rounds],
    }
    if plan.workers != 1:
        lines[f"each worker's own ({plan.workers})"] = [_bytes(each.worker) for each in rounds]
    notes = [f"note: {note}" for note in plan.notes]
    return Group(summary, _plan_table(head, lines), "", _whole_runs(plan.methods), *notes)


def _whole_runs(methods: Sequence[MethodPlan]) -> Table:
    def mean(method: MethodPlan, way: str) -> str:
        return _bytes(sum(getattr(each, way) for each in method.rounds) / len(method.rounds))

    def total(method: MethodPlan, count: float | None) -> str:
        return ("" if method.counted else "about ") + _bytes(count)

    roles = sorted({role for method in methods for role in method.parameters})
    lines = {
        **{f"parameters of {r}": [f"{m.parameters.get(r, 0):,}" for m in methods] for r in roles},
        "clients trained at once": [str(method.bank) for method in methods],
        "their adapters": [_bytes(method.adapters) for method in methods],
        "one client sends, mean": [mean(method, "up") for method in methods],
        "one client receives, mean": [mean(method, "down") for method in methods],
        "receives in its first round": [_bytes(method.first_down) for method in methods],
        "all clients send": [total(method, method.up) for method in methods],
        "all clients receive": [total(method, method.down) for method in methods],
        "training, FLOPs": [_short(method.flops) for method in methods],
        "checkpoints and adapter": [_bytes(method.checkpoints) for method in methods],
        "what clients keep, on disk": [_bytes(method.personal) for method in methods],
    }
    return _plan_table([method.name for method in methods], lines)


def _plan_table(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> Table:
    rows = [[what, *values] for what, values in lines.items()]
    return table(["", *columns], rows, widths=(max(map(len, lines)),))


def _bytes(count: float | None) -> str:
    """'1.57 MB', in powers of 1000."""
    return "unknown" if count is None else f"{_short(count)}B"


def _short(count: float | None) -> str:
    """'1.57 M': three digits and a power of 1000."""
    if count is None:
        return "unknown"
    power = 0
    while abs(count) >= 1000 and power < 6:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {' kMGTPE'[power].strip()}".strip() + ("" if power else " ")
