"""The linear model in words: tables of cells, and what came out beside what was to be expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rolora.theory.curves import Outcome, Round
from rolora.theory.sweeps import FOUND, SweepRow

GOAL = 1e-9  # sin θ
ROUNDING = 1e-13  # a sine up to here is float64 arithmetic
NEAR = 0.05  # of FFA-LoRA's floor

Cells = list[list[str]]


def round_cells(outcome: Outcome) -> Cells:
    """A head, and a line for each of some ten rounds."""
    last = len(outcome.rounds)
    every = max(1, last // 6)
    chosen = {1, 2, 5, last, *range(every, last - every // 2, every)}
    head = ["round", "sin θ", "bound", "loss RoLoRA", "loss FFA-LoRA", "loss FedAvg of LoRA"]
    lines = [
        [str(one.round), *(f"{value:.2g}" for value in (one.sin, one.bound, *_losses(one)))]
        for one in outcome.rounds
        if one.round in chosen
    ]
    return [head, *lines]


def _losses(one: Round) -> tuple[float, float, float]:
    return one.loss_rolora, one.loss_ffa, one.loss_fedit


def sweep_cells(name: str, rows: Sequence[SweepRow]) -> Cells:
    """A head, and a line for each value: after the last round, means over the seeds.

    Rounds are from the fastest seed to the slowest; FedAvg of LoRA's error is round 1's.
    """
    head = [
        *(name, "sin θ RoLoRA", "sin θ FedAvg", f"rounds to {FOUND:g}"),
        *("loss RoLoRA", "loss FFA-LoRA", "loss FedAvg", "FedAvg's error"),
    ]
    lines = [
        [
            f"{row.value:g}",
            *(f"{one.mean:.2g} ± {one.sd:.1g}" for one in (row.sin, row.sin_fedit)),
            _until(row.rounds_until_found),
            *(f"{one.mean:.3g}" for one in (row.loss_rolora, row.loss_ffa, row.loss_fedit)),
            f"{row.fedit_error.mean:.1%}",
        ]
        for row in rows
    ]
    return [head, *lines]


def _until(rounds: Sequence[int | None]) -> str:
    """From fewest to most rounds, and how many seeds got there if not all did."""
    there = [one for one in rounds if one is not None]
    if not there:
        return "–"
    span = f"{min(there)}" if min(there) == max(there) else f"{min(there)}–{max(there)}"
    return span if len(there) == len(rounds) else f"{span} ({len(there)}/{len(rounds)})"


@dataclass(frozen=True)
class Verdict:
    """One claim on one experiment; ``holds`` is None for what is said without being a claim."""

    holds: bool | None
    text: str


def theory_verdicts(outcome: Outcome) -> list[Verdict]:
    """What the experiment says to the paper's claims, and where it leaves the paper's model."""
    return [_angle(outcome), _bound(outcome), _floor(outcome), _fedit(outcome), *_outside(outcome)]


def _angle(outcome: Outcome) -> Verdict:
    last, until = outcome.rounds[-1], outcome.rounds_until(GOAL)
    start = outcome.setting.delta0
    if until is not None:
        return Verdict(
            True, f"RoLoRA finds a*: from sin θ = {start:g} to below {GOAL:g} in {until} rounds."
        )
    left = f"RoLoRA is at sin θ = {last.sin:.2g} after round {last.round}, not below {GOAL:g}"
    if outcome.expected.sin > ROUNDING:
        left += f"; noise and differing b_i* leave about {outcome.expected.sin:.2g}"
    return Verdict(False, f"{left}.")


def _bound(outcome: Outcome) -> Verdict:
    over = [one.round for one in outcome.rounds if one.sin > one.bound + ROUNDING]
    if over:
        return Verdict(
            False, f"sin θ is above the bound in {len(over)} rounds, first in round {over[0]}."
        )
    sines = [outcome.setting.delta0, *(one.sin for one in outcome.rounds)]
    shrunk = [after / before for before, after in pairwise(sines) if before > ROUNDING]
    slow = [round for round, ratio in enumerate(shrunk, 1) if ratio > outcome.factor]
    if slow:
        pace = (
            f"shrinks by the theorem's factor {outcome.factor:.3f} up to round {slow[0] - 1} only"
        )
    else:
        pace = (
            f"shrinks to {fmean(shrunk):.3f} of itself a round ({max(shrunk):.3f} at most); the "
            f"theorem promises {outcome.factor:.3f}"
        )
    return Verdict(True, f"sin θ is under the bound in every round, and {pace}.")


def _floor(outcome: Outcome) -> Verdict:
    found, floor = outcome.rounds[-1].loss_ffa, outcome.expected.loss_ffa
    away = found / floor - 1
    side = "above" if away > 0 else "below"
    return Verdict(
        abs(away) <= NEAR,
        f"FFA-LoRA stays at a loss of {found:.3g}, {abs(away):.1%} {side} the {floor:.3g} that its "
        f"a leaves with infinitely many rows; RoLoRA is at {outcome.rounds[-1].loss_rolora:.3g}.",
    )


def _fedit(outcome: Outcome) -> Verdict:
    first, last = outcome.fedit_error[0], outcome.fedit_error[-1]
    return Verdict(
        None,
        f"FedAvg of LoRA is at sin θ = {outcome.fedit_sin[-1]:.2g} and a loss of "
        f"{outcome.rounds[-1].loss_fedit:.3g}; the relative error of its averages was {first:.2g} "
        f"in round 1 and {last:.2g} in the last.",
    )


def _outside(outcome: Outcome) -> list[Verdict]:
    """What of the theorem's assumptions does not hold here."""
    setting = outcome.setting
    notes = []
    if setting.samples < setting.dimension:
        notes.append("there are fewer rows a client than dimensions")
    if setting.clients * setting.samples < setting.dimension:
        notes.append("all rows together do not determine a*")
    if setting.noise:
        notes.append("there is noise")
    if setting.heterogeneity:
        notes.append("the clients' b_i* differ (the bound is with the norm of their mean)")
    if setting.eta * outcome.expected.b_norm**2 >= 0.5:
        notes.append("η‖b*‖² is 0.5 or more, a long step")
    return [Verdict(None, f"Not the theorem's setting: {note}.") for note in notes]
