"""The linear model in words: tables, and how the results compare with theory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rolora.theory.curves import Outcome, Round
from rolora.theory.sweeps import FOUND, SweepRow

GOAL = 1e-9  # sin θ
ROUNDING = 1e-13  # sines up to this are float64 rounding
NEAR = 0.05  # relative distance to FFA-LoRA's floor

Cells = list[list[str]]


def round_cells(outcome: Outcome) -> Cells:
    """A header, and a line for each of about ten rounds."""
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
    """A header, and a line per value with means over the seeds after the last round.

    Rounds are those of the fastest and the slowest seed; FedAvg's error is that of round 1.
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
    """The range of rounds, and how many seeds converged if not all did."""
    there = [one for one in rounds if one is not None]
    if not there:
        return "–"
    span = f"{min(there)}" if min(there) == max(there) else f"{min(there)}–{max(there)}"
    return span if len(there) == len(rounds) else f"{span} ({len(there)}/{len(rounds)})"


@dataclass(frozen=True)
class Statement:
    """A statement about one experiment; ``holds`` is None if it is a remark and not a claim."""

    holds: bool | None
    text: str


def theory_verdicts(outcome: Outcome) -> list[Statement]:
    """Whether the paper's claims hold, and which of its assumptions do not."""
    return [_angle(outcome), _bound(outcome), _floor(outcome), _fedit(outcome), *_outside(outcome)]


def _angle(outcome: Outcome) -> Statement:
    last, until = outcome.rounds[-1], outcome.rounds_until(GOAL)
    start = outcome.setting.delta0
    if until is not None:
        return Statement(
            True, f"RoLoRA finds a*: from sin θ = {start:g} to below {GOAL:g} in {until} rounds."
        )
    left = f"RoLoRA is at sin θ = {last.sin:.2g} after round {last.round}, not below {GOAL:g}"
    if outcome.expected.sin > ROUNDING:
        left += f"; with noise and different b_i*, about {outcome.expected.sin:.2g} is expected"
    return Statement(False, f"{left}.")


def _bound(outcome: Outcome) -> Statement:
    over = [one.round for one in outcome.rounds if one.sin > one.bound + ROUNDING]
    if over:
        return Statement(
            False, f"sin θ is above the bound in {len(over)} rounds, first in round {over[0]}."
        )
    sines = [outcome.setting.delta0, *(one.sin for one in outcome.rounds)]
    shrunk = [after / before for before, after in pairwise(sines) if before > ROUNDING]
    slow = [round for round, ratio in enumerate(shrunk, 1) if ratio > outcome.factor]
    if slow:
        pace = (
            f"shrinks by the theorem's factor {outcome.factor:.3f} only up to round {slow[0] - 1}"
        )
    else:
        pace = (
            f"shrinks by a factor of {fmean(shrunk):.3f} per round (at most {max(shrunk):.3f}); "
            f"the theorem guarantees {outcome.factor:.3f}"
        )
    return Statement(True, f"sin θ is under the bound in every round, and {pace}.")


def _floor(outcome: Outcome) -> Statement:
    found, floor = outcome.rounds[-1].loss_ffa, outcome.expected.loss_ffa
    away = found / floor - 1
    side = "above" if away > 0 else "below"
    return Statement(
        abs(away) <= NEAR,
        f"FFA-LoRA stays at a loss of {found:.3g}, {abs(away):.1%} {side} the {floor:.3g} expected "
        f"with infinitely many rows; RoLoRA reaches {outcome.rounds[-1].loss_rolora:.3g}.",
    )


def _fedit(outcome: Outcome) -> Statement:
    first, last = outcome.fedit_error[0], outcome.fedit_error[-1]
    return Statement(
        None,
        f"FedAvg of LoRA reaches sin θ = {outcome.fedit_sin[-1]:.2g} and a loss of "
        f"{outcome.rounds[-1].loss_fedit:.3g}; the relative error of its averages was {first:.2g} "
        f"in round 1 and {last:.2g} in the last.",
    )


def _outside(outcome: Outcome) -> list[Statement]:
    """The theorem's assumptions that do not hold here."""
    setting = outcome.setting
    notes = []
    if setting.samples < setting.dimension:
        notes.append("a client has fewer rows than dimensions")
    if setting.clients * setting.samples < setting.dimension:
        notes.append("all rows together do not determine a*")
    if setting.noise:
        notes.append("there is noise")
    if setting.heterogeneity:
        notes.append("the clients' b_i* differ (the bound uses the norm of their mean)")
    if setting.eta * outcome.expected.b_norm**2 >= 0.5:
        notes.append("η‖b*‖² is 0.5 or more, a large step")
    return [Statement(None, f"Outside the theorem's setting: {note}.") for note in notes]
