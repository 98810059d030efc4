"""The problem of the paper's linear model: the clients' data and the parameters to recover.

Client i holds rows X_i (samples, dimension), standard normal, and Y_i = X_i a* b_i*ᵀ + noise
(samples, width). All clients fit one shared a bᵀ: a is lora_A, b is lora_B, and the rank is 1. a*
and every a have norm 1, and their distance is sin θ = ‖(I − a aᵀ) a*‖ (Chen et al., NeurIPS 2025,
arXiv:2502.01755, the section on a linear model). Everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rolora.algorithm.seeding import generator
from rolora.errors import ConfigError

MOST_NUMBERS = 1 << 28  # in X and Y of all clients; 2 GiB
LARGEST = 1e30  # of norm and noise, whose fourth powers and reciprocals must be finite


@dataclass(frozen=True)
class Setting:
    """One experiment. ConfigError for values out of range.

    ``dimension`` and ``width``: lengths of a and b. ``samples``: rows per client. ``b_norm``:
    ‖b_i*‖ of every client. ``noise``: standard deviation of the noise on each element of Y_i.
    ``heterogeneity``: sine of the angle between b_i* and b*. The paper's model has neither noise
    nor heterogeneity.
    """

    dimension: int = 50
    samples: int = 200
    clients: int = 5
    width: int = 50
    eta: float = 0.25
    delta0: float = 0.9
    rounds: int = 60
    b_norm: float = 1.0
    noise: float = 0.0
    heterogeneity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "dimension": (self.dimension >= 2, "at least 2"),
            "samples": (self.samples >= 1, "at least 1"),
            "clients": (self.clients >= 1, "at least 1"),
            "width": (self.width >= 1, "at least 1"),
            "rounds": (self.rounds >= 1, "at least 1"),
            "delta0": (0 < self.delta0 < 1, "between 0 and 1 (a sine)"),
            "eta": (0 < self.eta < math.inf, "above 0"),
            "b_norm": (1 / LARGEST <= self.b_norm <= LARGEST, f"{1 / LARGEST:g} to {LARGEST:g}"),
            "noise": (0 <= self.noise <= LARGEST, f"0 to {LARGEST:g} (a standard deviation)"),
            "heterogeneity": (0 <= self.heterogeneity < 1, "at least 0 and below 1 (a sine)"),
        }
        for name, (fits, range) in ranges.items():
            if not fits:
                raise ConfigError(f"{name} = {getattr(self, name):g}: must be {range}")
        longest = 1 / ((1 - self.delta0**2) * self.b_norm**2)
        if self.eta > longest:
            raise ConfigError(
                f"eta = {self.eta:g} is too large: the bound √(1 − η(1 − δ0²)‖b*‖²) is not real; "
                f"use at most {longest:.3g}"
            )
        if self.heterogeneity and self.width < 2:
            raise ConfigError("heterogeneity needs a width of 2 or more")
        numbers = self.clients * self.samples * (self.dimension + self.width)
        if numbers > MOST_NUMBERS:
            raise ConfigError(
                f"clients · samples · (dimension + width) = {numbers:,} is too large; "
                f"at most {MOST_NUMBERS:,}"
            )


@dataclass(frozen=True, eq=False)
class Problem:
    """The clients' data and the parameters to recover."""

    setting: Setting
    x: Tensor  # (clients, samples, dimension)
    y: Tensor  # (clients, samples, width)
    a_star: Tensor  # (dimension), of norm 1
    a_start: Tensor  # (dimension), of norm 1, at the sine delta0 from a_star
    b_stars: Tensor  # (clients, width)


def draw_problem(setting: Setting) -> Problem:
    """The problem of this setting and seed; a client's rows do not depend on other clients."""

    def normal(*shape: int, purpose: tuple[str | int, ...]) -> Tensor:
        rng = generator(setting.seed, "theory", *purpose)
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def each(what: str, *shape: int) -> Tensor:
        return torch.stack([normal(*shape, purpose=(what, k)) for k in range(setting.clients)])

    a_star = unit(normal(setting.dimension, purpose=("a",)))
    b_star = unit(normal(setting.width, purpose=("b",)))
    aside = unit(_orthogonal(normal(setting.dimension, purpose=("start",)), a_star))
    b_stars = b_star.expand(setting.clients, -1)
    if setting.heterogeneity:
        own = unit(_orthogonal(each("own b", setting.width), b_star))
        b_stars = turned(b_stars, own, setting.heterogeneity)
    x = each("x", setting.samples, setting.dimension)
    y = (x @ a_star)[..., None] * (setting.b_norm * b_stars)[:, None]
    if setting.noise:
        y += setting.noise * each("noise", setting.samples, setting.width)
    start = turned(a_star, aside, setting.delta0)
    return Problem(setting, x, y, a_star, start, setting.b_norm * b_stars)


def unit(vectors: Tensor) -> Tensor:
    """Each vector (last axis) divided by its norm."""
    norms: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / norms


def turned(vector: Tensor, aside: Tensor, sine: float) -> Tensor:
    """The unit vector at this sine from ``vector`` towards the orthogonal vector ``aside``."""
    return math.sqrt(1 - sine**2) * vector + sine * aside


def _orthogonal(vectors: Tensor, direction: Tensor) -> Tensor:
    along: Tensor = (vectors @ direction)[..., None] * direction
    return vectors - along


def sine(a: Tensor, a_star: Tensor) -> float:
    """sin θ = ‖(I − a aᵀ) a*‖ for vectors of norm 1; exact to about 1e-16, however small."""
    return float(_orthogonal(a_star, a).norm())
