"""RoLoRA, FFA-LoRA and FedAvg of LoRA on the paper's linear model, and what theory predicts.

Client i's loss is l_i(a, b) = ‖X_i a bᵀ − Y_i‖² / samples; ``rolora.theory.linear_model`` has the
rest of the problem.

The paper's: the iteration (``rolora_round``), its bound (``bound_factor``) and FFA-LoRA's floor
δ0²‖b*‖², for the same b* at every client, no noise, many rows and a small step. The rest is ours.

>>> from rolora.theory.linear_model import Setting, draw_problem
>>> last = simulate(draw_problem(Setting())).rounds[-1]
>>> last.sin < 1e-9 < 0.7 < last.loss_ffa
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rolora.theory.linear_model import Problem, Setting, sine, unit


def best_b(problem: Problem, a: Tensor) -> Tensor:
    """Each client's least-squares b_i = Y_iᵀ X_i a / ‖X_i a‖² at ``a``: (clients, width)."""
    z = problem.x @ a
    return (z[:, None] @ problem.y)[:, 0] / z.square().sum(dim=1, keepdim=True)


def gradient_of_a(problem: Problem, a: Tensor, b: Tensor) -> Tensor:
    """Each client's ∇_a l_i(a, b) = (2/samples) X_iᵀ (X_i a bᵀ − Y_i) b: (clients, dimension).

    ``b`` is (width), the same for every client, or (clients, width).
    """
    target = problem.y @ b if b.dim() == 1 else (problem.y @ b[..., None])[..., 0]
    residual = (problem.x @ a) * b.square().sum(dim=-1, keepdim=True) - target
    return 2 / problem.x.shape[1] * (residual[:, None] @ problem.x)[:, 0]


def loss(problem: Problem, a: Tensor, b: Tensor) -> float:
    """The mean over clients of (1/samples) ‖X_i a bᵀ − Y_i‖²."""
    rows = problem.y.flatten(0, 1)
    return float(torch.addr(rows, problem.x.flatten(0, 1) @ a, b, beta=-1).norm()) ** 2 / len(rows)


def rolora_round(problem: Problem, a: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration of the paper -> (a, b); ``rolora run`` counts its two phases as two rounds.

    Every client solves for b_i at the same a, and the server averages them. Every client sends
    ∇_a l_i at (a, mean b), and the server takes a step ``eta`` along the mean and normalises a.
    """
    b = best_b(problem, a).mean(dim=0)
    return unit(a - problem.setting.eta * gradient_of_a(problem, a, b).mean(dim=0)), b


def fedit_round(problem: Problem, a: Tensor) -> tuple[Tensor, Tensor, float]:
    """One round of FedAvg of LoRA -> (a, b, aggregation error); the definition is ours.

    Each client does alone what RoLoRA's clients do together: b_i by least squares at a, then a step
    a_i = unit(a − η ∇_a l_i(a, b_i)). The server averages the a_i and the b_i separately, and
    normalises a. The error is ‖mean(a_i b_iᵀ) − a bᵀ‖ / ‖mean(a_i b_iᵀ)‖ (Frobenius).
    """
    own_b = best_b(problem, a)
    own_a = unit(a - problem.setting.eta * gradient_of_a(problem, a, own_b))
    mean_a, b = unit(own_a.mean(dim=0)), own_b.mean(dim=0)
    products = own_a.mT @ own_b / len(own_a)
    return mean_a, b, float((products - torch.outer(mean_a, b)).norm() / products.norm())


def bound_factor(eta: float, delta0: float, b_norm: float) -> float:
    """The paper's theorem: each round multiplies sin θ by at most √(1 − η(1 − δ0²)‖b*‖²)."""
    return math.sqrt(1 - eta * (1 - delta0**2) * b_norm**2)


def population_sin(sin: float, eta: float, b_norm: float) -> float:
    """sin θ after one iteration with infinitely many rows, exactly (ours).

    With c = cos θ: mean b = c b*, the gradient is 2c‖b*‖²(c a − a*), which is orthogonal to a; so
    sin⁺ = sin · |1 − 2ηc²‖b*‖²| / √(1 + 4η²c²‖b*‖⁴ sin²).
    """
    strength = 2 * eta * b_norm**2
    cosine2 = 1 - sin**2
    return sin * abs(1 - strength * cosine2) / math.sqrt(1 + strength**2 * cosine2 * sin**2)


@dataclass(frozen=True)
class Expected:
    """The limits of the methods; losses as with infinitely many rows.

    ``b_norm``: ‖mean b_i*‖, which replaces ‖b*‖ if clients differ. ``loss``: the minimum over
    shared a bᵀ, width · noise² plus the variance of the b_i*. ``loss_ffa``: that plus δ0² b_norm².
    ``sin``: RoLoRA's limit, to first order in 1/√(clients · samples).
    """

    b_norm: float
    loss: float
    loss_ffa: float
    sin: float


def expected(problem: Problem) -> Expected:
    """The limits for this problem."""
    setting, mean_b = problem.setting, problem.b_stars.mean(dim=0)
    power = float(mean_b.square().sum())
    least = setting.width * setting.noise**2
    least += float((problem.b_stars - mean_b).square().sum(dim=1).mean())
    # at a*, the gradient of a is X_iᵀ times a residual; this is the residual's variance along b
    apart = ((problem.b_stars - mean_b) @ mean_b).square().mean()
    variance = float(apart) + setting.noise**2 * power
    rows = setting.clients * setting.samples
    sin = math.sqrt((setting.dimension - 1) * variance / rows) / power
    return Expected(math.sqrt(power), least, least + setting.delta0**2 * power, min(sin, 1.0))


@dataclass(frozen=True)
class Round:
    """RoLoRA's sin θ, the bound δ0 · factor^round on it, and mean losses after a round (from 1)."""

    round: int
    sin: float
    bound: float
    loss_rolora: float
    loss_ffa: float
    loss_fedit: float


@dataclass(frozen=True)
class Outcome:
    """One experiment; ``fedit_sin`` and ``fedit_error`` (of aggregation) have a value per round."""

    setting: Setting
    rounds: tuple[Round, ...]
    factor: float
    expected: Expected
    fedit_sin: tuple[float, ...]
    fedit_error: tuple[float, ...]

    def rounds_until(self, sin: float) -> int | None:
        """The first round after which RoLoRA's sin θ is below this, or None."""
        return next((one.round for one in self.rounds if one.sin < sin), None)

    def population(self) -> tuple[float, ...]:
        """sin θ before round 1 and after each round if every client had infinitely many rows."""
        sines = [self.setting.delta0]
        for _ in self.rounds:
            sines.append(population_sin(sines[-1], self.setting.eta, self.expected.b_norm))
        return tuple(sines)


def simulate(problem: Problem, along: Callable[[range], Iterable[int]] = iter) -> Outcome:
    """RoLoRA, FFA-LoRA (a stays a_start, b is averaged) and FedAvg of LoRA on the same rows.

    ``along`` wraps the iteration over rounds, for instance in a progress bar.
    """
    setting, floors = problem.setting, expected(problem)
    factor = bound_factor(setting.eta, setting.delta0, floors.b_norm)
    loss_ffa = loss(problem, problem.a_start, best_b(problem, problem.a_start).mean(dim=0))
    a = a_fedit = problem.a_start
    rounds, fedit_sin, fedit_error = [], [], []
    for round in along(range(1, setting.rounds + 1)):
        a, b = rolora_round(problem, a)
        a_fedit, b_fedit, error = fedit_round(problem, a_fedit)
        fedit_sin.append(sine(a_fedit, problem.a_star))
        fedit_error.append(error)
        rounds.append(
            Round(
                round=round,
                sin=sine(a, problem.a_star),
                bound=setting.delta0 * factor**round,
                loss_rolora=loss(problem, a, b),
                loss_ffa=loss_ffa,
                loss_fedit=loss(problem, a_fedit, b_fedit),
            )
        )
    return Outcome(setting, tuple(rounds), factor, floors, tuple(fedit_sin), tuple(fedit_error))
