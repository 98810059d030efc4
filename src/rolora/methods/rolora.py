"""RoLoRA: alternate which factor is trained and averaged (Chen et al., NeurIPS 2025, Algorithm 1).

Odd rounds train and average lora_B with lora_A frozen, even rounds the other way round. All
clients share the frozen factor, so the mean of the products is the product of the means: every
average is exact, half of the adapter travels, and both factors are learned. arXiv:2502.01755.

With gradient G of the product, a step on lora_B moves the product by −lr · G AᵀA, one on lora_A by
−lr · BBᵀ G. One rate cannot fit both as the sizes of the factors drift apart, so a run swings from
round to round. With ``turn`` the server writes the same product with an orthogonal frozen factor
before each round: both kinds of steps are then projections of G times the same number (for SGD this
is the Riemannian preconditioning of Zhang & Pilanci, arXiv:2402.02347). The frozen factor is
shared, so averages stay exact, and a turn is rank · rank numbers per layer on the way down.

The first round of two clients that only pretend to train, with one layer of rank 1:

>>> import torch
>>> from rolora.algorithm.adapter import Assignment, ClientInfo, Specs, TensorSpec, Update
>>> from rolora.algorithm.method import ServerState
>>> from rolora.algorithm.reduce import mean
>>> from rolora.algorithm.seeding import generator
>>> from rolora.algorithm.step import Aggregation, step
>>> a, b = "layer.lora_A.weight", "layer.lora_B.weight"
>>> specs = Specs((TensorSpec(a, "A", (1, 3)), TensorSpec(b, "B", (2, 1))), {"layer": 2.0}, {})
>>> rolora = method()
>>> server = ServerState(rolora.init(specs, generator(0, "init")))
>>> cohort, updates = {}, []
>>> for name, rows, value in (("ann", 30, 1.0), ("bob", 10, 5.0)):
...     info = ClientInfo(name, num_examples=rows, rank=1, round=1)
...     cohort[name] = Assignment(info, rolora.download(server, info))
...     trained = cohort[name].received | {b: torch.full((2, 1), value)}
...     sent = rolora.upload(cohort[name].received, trained, info).only(rolora.shared(1))
...     updates.append(Update(name, sent, rows, metrics={"loss": 0.5}))
>>> after, report = step(rolora, Aggregation(mean()), server, cohort, updates, generator(0, "step"))
>>> after.round, report.accepted, report.aggregation_error
(1, ('ann', 'bob'), 0.0)
>>> after.adapter[b]  # (30 * 1.0 + 10 * 5.0) / 40
tensor([[2.],
        [2.]])
>>> torch.equal(after.adapter[a], server.adapter[a])
True
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from rolora.algorithm import factors
from rolora.algorithm.adapter import AdapterState, Roles, Specs
from rolora.algorithm.method import Method, Reduce, ServerState, lora_init, merge_shared
from rolora.errors import ConfigError


def method(
    *,
    first: Literal["A", "B"] = "B",
    b_rounds: int = 1,
    orthogonal_a: bool = False,
    turn: float | None = None,
    scaled: bool = False,
) -> Method:
    """How the factors alternate; the defaults are the paper's algorithm.

    ``first``: the factor of round 1; "B", because lora_A has no gradient while lora_B = 0.
    ``b_rounds``: rounds of lora_B per round of lora_A (the paper's unbalanced schedules).
    ``orthogonal_a``: start from a lora_A with orthonormal rows instead of Kaiming uniform.
    ``turn``: the length of the rows of lora_A, or columns of lora_B, that the server makes
    orthogonal before each round in which they are frozen. None: it makes none.
    ``scaled``: precondition each factor's gradient by the other factor, instead of turning it.
    """
    if first not in ("A", "B"):
        raise ConfigError(f"rolora: first must be 'A' or 'B', not {first!r}")
    if b_rounds < 1:
        raise ConfigError(f"rolora: b_rounds must be at least 1, not {b_rounds}")
    if turn is not None and not turn > 0:
        raise ConfigError(f"rolora: turn must be positive, not {turn}")

    def moving(round: int) -> Roles:
        # by the server's round number, so clients that missed rounds cannot get out of phase
        place = (round - 1) % (b_rounds + 1)
        takes_a = place == (b_rounds if first == "B" else 0)
        return frozenset({"A" if takes_a else "B", "head"})

    def ready(server: ServerState) -> ServerState:
        """The state whose next round finds an orthogonal frozen factor."""
        if turn is None or (server.round and moving(server.round) == moving(server.round + 1)):
            return server
        return factors.turn(server, "A" if "B" in moving(server.round + 1) else "B", turn)

    def init(specs: Specs, rng: torch.Generator) -> AdapterState:
        first_pair = factors.orthonormal_rows(specs, rng) if orthogonal_a else lora_init(specs, rng)
        return ready(ServerState(first_pair)).adapter

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        return ready(replace(merge_shared(server, reduce, rng), round=server.round + 1))

    return Method(
        name="rolora",
        init=init,
        trainable=lambda round, step: moving(round),
        shared=moving,
        aggregate=aggregate,
        gradient=factors.scaled if scaled else None,
        resets_factors=turn is not None,
    )
