"""Write the tables of docs/theory.md, and docs/theory.png: python docs/make_theory.py"""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from pages import put, save_picture

from rolora.files import write_file
from rolora.report.theory_figure import theory_figure
from rolora.report.theory_text import GOAL, Cells, round_cells, sweep_cells
from rolora.theory.curves import simulate
from rolora.theory.linear_model import Setting, draw_problem
from rolora.theory.sweeps import VALUES, SweepRow, measure, plan_sweep

PAGE, PICTURE = (Path(__file__).with_name(name) for name in ("theory.md", "theory.png"))
SEEDS = 20
FEW = Setting(samples=20)


def markdown(cells: Cells) -> str:
    """A right-aligned table; the first row is its head."""
    head, *lines = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([head, f"|{'---:|' * len(cells[0])}", *lines])


def over_seeds() -> str:
    """The claims over seeds 0 to 19 of the default setting."""
    outcomes = [simulate(draw_problem(Setting(seed=seed))) for seed in range(SEEDS)]
    until = [outcome.rounds_until(GOAL) or 0 for outcome in outcomes]
    assert all(until)
    slowest = []
    for outcome in outcomes:
        sines = [outcome.setting.delta0, *(one.sin for one in outcome.rounds)]
        slowest.append(max(after / before for before, after in pairwise(sines)))
    ffa = [outcome.rounds[-1].loss_ffa for outcome in outcomes]
    return (
        f"Over seeds 0 to {SEEDS - 1}: sin θ is below {GOAL:g} after {min(until)} to {max(until)} "
        f"rounds; the slowest round multiplied sin θ by {max(slowest):.3f}, the theorem allows "
        f"{outcomes[0].factor:.3f}; FFA-LoRA's loss is {statistics.fmean(ffa):.3f} ± "
        f"{statistics.stdev(ffa):.3f}."
    )


def sweep(setting: Setting, name: str) -> list[SweepRow]:
    """All rows of one sweep."""
    return [measure(name, settings) for settings in plan_sweep(setting, name)]


def main() -> None:
    """Run everything, then write the page and the picture."""
    outcome = simulate(draw_problem(Setting()))
    sweeps = {name: sweep(Setting(), name) for name in VALUES}
    text = PAGE.read_text(encoding="utf-8")
    text = put(text, "theory:rounds", [markdown(round_cells(outcome))])
    text = put(text, "theory:seeds", [over_seeds()])
    for name, rows in sweeps.items():
        text = put(text, f"theory:{name}", [markdown(sweep_cells(name, rows))])
    text = put(text, "theory:few", [markdown(sweep_cells("noise", sweep(FEW, "noise")))])
    mixed = sweep(replace(FEW, noise=0.3), "heterogeneity")
    text = put(text, "theory:mixed", [markdown(sweep_cells("heterogeneity", mixed))])
    write_file(PAGE, text)
    save_picture(theory_figure(outcome, sweeps), PICTURE)


if __name__ == "__main__":
    main()
