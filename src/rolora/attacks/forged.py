"""Attacks by what bad clients send. They know all that honest clients of the round send.

A *move* is what a client sends minus what it received. Where a strength is to be found, it is the
one of ``STRENGTHS`` that takes the server's result farthest, by what it does to the model, from the
result without an attack; the attackers know the server's rule. The statistics of honest moves are
computed in float64, each coordinate by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Roles, layer_of, role_of
from rolora.algorithm.effect import inner_products, squared_distances
from rolora.attacks.attack import Attack, Scene, Sent

STRENGTHS = (0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
Moves = Mapping[str, Tensor]


def sign_flip(*, factor: float = 10.0) -> Attack:
    """Each bad client sends its own move times −``factor``."""
    return Attack(forge=lambda scene: _times(scene, -factor))


def scale(*, factor: float = 100.0) -> Attack:
    """Each bad client sends its own move times ``factor`` (Bagdasaryan et al. 2020, scaling)."""
    return Attack(forge=lambda scene: _times(scene, factor))


def weight_lie(*, rows: int = 1000) -> Attack:
    """Each bad client claims ``rows`` times as many rows as it has, and sends its move reversed."""
    return Attack(forge=lambda scene: _times(scene, -1.0), claim=lambda count: rows * count)


def gauss(*, factor: float = 30.0) -> Attack:
    """Each bad client sends normal noise, ``factor`` times as large as honest moves are.

    The standard deviation is the root mean square of the honest moves, tensor by tensor.
    """

    def forge(scene: Scene) -> Sent:
        sizes = {name: m.square().mean().sqrt() for name, m in _honest_moves(scene).items()}

        def noise(client: str) -> Moves:
            own = scene.own[client]
            return {
                name: factor * size * torch.randn(own[name].shape, generator=scene.rng)
                for name, size in sizes.items()
            }

        return _sent(scene, noise)

    return Attack(forge=forge)


def nan() -> Attack:
    """Each bad client sends values that are not a number."""

    def forge(scene: Scene) -> Sent:
        return {
            client: AdapterState(
                {name: torch.full_like(tensor, math.nan) for name, tensor in own.items()},
                own.scaling,
            )
            for client, own in scene.own.items()
        }

    return Attack(forge=forge)


def mimic() -> Attack:
    """All bad clients send what one honest client sends (Karimireddy et al. 2022).

    It is the one farthest along the direction in which honest moves differ most, so that clients
    with unusual rows count less.
    """

    def forge(scene: Scene) -> Sent:
        values = list(scene.honest.values())
        gram = inner_products(values, scene.start)
        centred = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
        along = torch.linalg.eigh(centred).eigenvectors[:, -1]
        victim = list(scene.honest)[int(along.abs().argmax())]
        move = _move(scene, victim, scene.honest[victim])
        return _all_moved(scene, move)

    return Attack(forge=forge)


def alie() -> Attack:
    """All bad clients send the honest mean minus z honest standard deviations.

    "A little is enough" (Baruch et al. 2019), with the z that harms most (Shejwalkar & Houmansadr
    2021).
    """

    def forge(scene: Scene) -> Sent:
        mean, moves = _honest_mean(scene), _honest_moves(scene)
        sd = {name: each.std(dim=0, correction=0) for name, each in moves.items()}
        return _worst(scene, lambda z: {name: mean[name] - z * sd[name] for name in mean})

    return Attack(forge=forge)


def ipm() -> Attack:
    """All bad clients send the honest mean move times −ε, with the ε that harms most.

    Inner-product manipulation (Xie et al. 2020).
    """
    return Attack(forge=_ipm)


def a_only() -> Attack:
    """``ipm`` on lora_A alone; everything else, and rounds without lora_A, as honest clients."""
    return Attack(forge=lambda scene: _ipm_on(frozenset({"A"}), scene))


def b_only() -> Attack:
    """``ipm`` on lora_B alone; everything else, and rounds without lora_B, as honest clients."""
    return Attack(forge=lambda scene: _ipm_on(frozenset({"B"}), scene))


def rank_collapse() -> Attack:
    """Bad clients pull the factors that move towards their best approximation of rank one.

    With the plain mean of clients of equal weight, and all of the pull, the averaged factors *are*
    of rank one. The share of the pull is the one that leaves least beside the first singular value.
    """

    def forge(scene: Scene) -> Sent:
        mean = _honest_mean(scene)
        weight = len(scene.cohort) / len(scene.own)
        factors = [name for name in mean if role_of(name) in ("A", "B")]

        def move(share: float) -> Moves:
            pulled = dict(mean)
            for name in factors:
                trained = scene.start[name].double() + mean[name]
                pulled[name] = mean[name] + share * weight * (_rank_one(trained) - trained)
            return pulled

        def flat(adapter: AdapterState) -> float:
            return sum(_first_share(adapter[name].double()) for name in factors)

        shares = [share / 10 for share in range(1, 11)]
        return _best(scene, (_all_moved(scene, move(share)) for share in shares), flat)

    return Attack(forge=forge)


def dormant_factor(*, factor: float = 30.0) -> Attack:
    """Bad clients move a factor far where the other one hides it, so that the product looks honest.

    To their own lora_B they add ``factor`` times the size of the honest moves, in the direction of
    rank space that lora_A shows least, the same in every round; likewise for lora_A. Where both
    move in one round they send lora_B times ``factor`` and lora_A divided by it, whose product is
    an honest client's.
    """

    def forge(scene: Scene) -> Sent:
        sizes = {
            name: each.square().sum(dim=(1, 2)).mean().sqrt()
            for name, each in _honest_moves(scene).items()
            if role_of(name) in ("A", "B")
        }
        found = {}
        for client, own in scene.own.items():
            sent = {name: tensor.double() for name, tensor in own.items()}
            for layer in sorted({layer_of(name) for name in sizes}):
                a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
                if a in sizes and b in sizes:
                    sent[a], sent[b] = sent[a] / factor, sent[b] * factor
                elif b in sizes:
                    hidden = torch.linalg.svd(scene.start[a].double()).U[:, -1]
                    sent[b] += factor * sizes[b] * torch.outer(_direction(len(sent[b])), hidden)
                else:
                    hidden = torch.linalg.svd(scene.start[b].double()).Vh[-1]
                    width = sent[a].shape[1]
                    sent[a] += factor * sizes[a] * torch.outer(hidden, _direction(width))
            found[client] = _as_sent(scene, client, sent)
        return found

    return Attack(forge=forge)


def _ipm(scene: Scene) -> Sent:
    mean = _honest_mean(scene)
    return _worst(scene, lambda e: {name: -e * move for name, move in mean.items()})


def _ipm_on(roles: Roles, scene: Scene) -> Sent:
    """``ipm`` on the tensors with these roles alone; the others are the bad clients' own."""
    if not roles & scene.trained:
        return scene.own

    def joined(sent: Sent) -> Sent:
        return {client: own | sent[client].only(roles) for client, own in scene.own.items()}

    return joined(_ipm(replace(scene, outcome=lambda sent: scene.outcome(joined(sent)))))


def _move(scene: Scene, client: str, sent: AdapterState) -> Moves:
    """What a client sends minus what it received, in float64."""
    received = scene.cohort[client].received
    return {name: tensor.double() - received[name] for name, tensor in sent.items()}


def _honest_moves(scene: Scene) -> Moves:
    """name -> the moves of the honest clients, (clients, *shape) in float64."""
    moves = [_move(scene, client, sent) for client, sent in scene.honest.items()]
    return {name: torch.stack([move[name] for move in moves]) for name in moves[0]}


def _honest_mean(scene: Scene) -> Moves:
    return {name: moves.mean(dim=0) for name, moves in _honest_moves(scene).items()}


def _times(scene: Scene, factor: float) -> Sent:
    """Each bad client's own move times ``factor``."""
    return _sent(
        scene,
        lambda client: {
            name: factor * move for name, move in _move(scene, client, scene.own[client]).items()
        },
    )


def _sent(scene: Scene, move: Callable[[str], Moves]) -> Sent:
    """What all bad clients send, by the move of each."""
    found = {}
    for client in scene.own:
        received = scene.cohort[client].received
        moved = {name: received[name] + by for name, by in move(client).items()}
        found[client] = _as_sent(scene, client, moved)
    return found


def _all_moved(scene: Scene, move: Moves) -> Sent:
    return _sent(scene, lambda client: move)


def _as_sent(scene: Scene, client: str, tensors: Moves) -> AdapterState:
    """The tensors in the dtypes that the client sends."""
    own = scene.own[client]
    return AdapterState({name: t.to(own[name].dtype) for name, t in tensors.items()}, own.scaling)


def _worst(scene: Scene, move: Callable[[float], Moves]) -> Sent:
    """What all bad clients send, with the strength that takes the server's result farthest."""
    clean = scene.outcome(scene.own)
    if clean is None:
        return scene.own

    def harm(adapter: AdapterState) -> float:
        gram = inner_products([adapter, clean], scene.start)
        return float(squared_distances(gram)[0, 1])

    return _best(scene, (_all_moved(scene, move(strength)) for strength in STRENGTHS), harm)


def _best(scene: Scene, candidates: Iterable[Sent], worth: Callable[[AdapterState], float]) -> Sent:
    """The candidate whose outcome is worth most to the attackers; the first among equals."""
    best, most = scene.own, -math.inf
    for sent in candidates:
        adapter = scene.outcome(sent)
        if adapter is not None and (value := worth(adapter)) > most:
            best, most = sent, value
    return best


def _rank_one(matrix: Tensor) -> Tensor:
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    first: Tensor = sizes[0] * torch.outer(left[:, 0], right[0])
    return first


def _first_share(matrix: Tensor) -> float:
    """The share of the first singular value's square in the sum of all squares; 1 for zero."""
    squares = torch.linalg.svdvals(matrix).square()
    return float(squares[0] / squares.sum()) if squares[0] else 1.0


def _direction(width: int) -> Tensor:
    """A unit vector (width,), always the same, so that moves of several rounds add up."""
    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1
    return signs / math.sqrt(width)
