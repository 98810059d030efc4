"""A round of any method without a model, and what must hold after it, method by method.

``CHECKS`` is written in plain torch, float64 and matrices multiplied out, from nothing but what
clients held and sent: none of the library's own factoring is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from method_rows import ROWS
from states import assign, dense, make_specs, same, sent, start_of, trained
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Roles, Update, role_of
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.reduce import mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, RoundReport, step

MEAN = Aggregation(mean())
HEAD: Roles = frozenset({"head"})
ALL: Roles = frozenset({"A", "B", "head"})
Matrices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A round before it is played: layers (out, in, rank), rows and rank of each client."""

    layers: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    round: int
    move: float
    seed: int


@dataclass(frozen=True)
class Played:
    """A round that was played; ``weights`` sum to 1."""

    method: Method
    before: AdapterState
    after: AdapterState
    infos: tuple[ClientInfo, ...]
    received: tuple[AdapterState, ...]
    trained: tuple[AdapterState, ...]
    updates: tuple[Update, ...]
    weights: tuple[float, ...]
    seed: int
    report: RoundReport

    @property
    def returned(self) -> list[AdapterState]:
        """What each client would hold if it took over what it sent."""
        return [r | u.adapter for r, u in zip(self.received, self.updates, strict=True)]

    def mean_of(self, parts: list[AdapterState] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The weighted mean of these, by name, summed in float64 in a loop."""
        total = {name: torch.zeros_like(tensor) for name, tensor in parts[0].items()}
        for weight, part in zip(self.weights, parts, strict=True):
            for name in total:
                total[name] = total[name] + weight * part[name]
        return total

    def mean_product(self) -> dict[str, Tensor]:
        """Σ p_i · (delta + s · B_i core_i A_i) of each layer."""
        return self.mean_of([dense(state) for state in self.returned])

    def mean_sent(self, roles: Roles) -> dict[str, Tensor]:
        """Σ p_i · what was sent, tensor by tensor, of these roles."""
        return self.mean_of([update.adapter.only(roles) for update in self.updates])


def play(method: Method, case: Case) -> Played:
    """The round of this case, its clients' training pretended, in float64."""
    before = start_of(method, make_specs(case.layers), case.seed, torch.float64)
    if method.name == "flora":  # whose lora_B is 0 before every round
        before = before | {n: 0 * t for n, t in before.only(frozenset({"B"})).items()}
    server = ServerState(before, round=case.round - 1)
    drawn = tuple(
        ClientInfo(f"client-{i}", size, rank, case.round)
        for i, (size, rank) in enumerate(zip(case.sizes, case.ranks, strict=False))
    )
    if not method.heterogeneous_ranks:
        drawn = tuple(replace(info, rank=4) for info in drawn)
    infos = method.cohort(drawn, sum(case.sizes))
    cohort = assign(method, server, infos)
    members = list(cohort.values())
    ended = [trained(method, one, case.seed + i, case.move) for i, one in enumerate(members)]
    updates = [sent(method, one, end) for one, end in zip(members, ended, strict=True)]
    after, report = step(method, MEAN, server, cohort, updates, generator(case.seed, "aggregate"))
    assert report.rejected == {}
    # HetLoRA's own weights are the norms of the products, the others' the rows
    scale = [
        size(dense(AdapterState(update.adapter, before.scaling)))
        if method.name == "hetlora"
        else float(update.num_examples)
        for update in updates
    ]
    return Played(
        method=method,
        before=before,
        after=after.adapter,
        infos=infos,
        received=tuple(one.received for one in members),
        trained=tuple(ended),
        updates=tuple(updates),
        weights=tuple(weight / sum(scale) for weight in scale),
        seed=case.seed,
        report=report,
    )


# oracles


def size(matrices: Matrices) -> float:
    return float(sum(matrix.square().sum() for matrix in matrices.values()) ** 0.5)


def less(one: Matrices, other: Matrices) -> dict[str, Tensor]:
    assert one.keys() == other.keys()
    return {name: one[name].double() - other[name].double() for name in one}


def near(one: Matrices, other: Matrices, tolerance: float = 1e-9) -> bool:
    return size(less(one, other)) <= tolerance * max(size(other), 1e-12)


def named(layer: str, which: str) -> str:
    return f"{layer}.lora_{which}.weight"


def tail(matrix: Tensor, rank: int) -> float:
    """The error of the best approximation of this rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


def is_mean_of_products(game: Played) -> None:
    """The server's change is the mean of the clients' changes, and its head that of their heads."""
    change = less(dense(game.after), dense(game.before))
    wanted = game.mean_of(
        [less(dense(r), dense(g)) for r, g in zip(game.returned, game.received, strict=True)]
    )
    assert near(change, wanted, 1e-6)
    is_mean(game, HEAD)
    assert game.report.aggregation_error is not None
    assert game.report.aggregation_error <= 1e-9


def is_mean(game: Played, roles: Roles) -> None:
    """Tensors of these roles are the weighted means of what was sent; there are such tensors."""
    wanted = game.mean_sent(roles)
    assert {role_of(name) for name in wanted} == roles
    assert near({name: game.after[name] for name in wanted}, wanted)


def stays(game: Played, roles: Roles) -> None:
    """The server's tensors of these roles are bit for bit as before; there are such tensors."""
    assert {role_of(name) for name in game.before.only(roles)} == roles
    assert same(game.after.only(roles), game.before.only(roles))


def sends_what_it_trained(game: Played) -> None:
    for end, update in zip(game.trained, game.updates, strict=True):
        assert same(update.adapter, end.select(update.adapter.__contains__))


def keeps_products(game: Played) -> None:
    """What was sent stands for the product that was trained, though other factors may say it."""
    for end, returned in zip(game.trained, game.returned, strict=True):
        assert near(dense(returned), dense(end))


def dense_error(game: Played) -> float:
    """The aggregation error, from matrices multiplied out."""
    change = less(dense(game.after), dense(game.before))
    moves = [less(dense(r), dense(g)) for r, g in zip(game.returned, game.received, strict=True)]
    return size(less(game.mean_of(moves), change)) / size(game.mean_product())


# what must hold, method by method


def factor_b(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean_of_products(game)
    is_mean(game, frozenset({"B", "head"}))
    stays(game, frozenset({"A"}))


def factor_a(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean_of_products(game)
    is_mean(game, frozenset({"A", "head"}))
    stays(game, frozenset({"B"}))


def by_turns(game: Played) -> None:
    (factor_b if game.infos[0].round % 2 else factor_a)(game)


def averaged(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean(game, frozenset({"A", "B", "head"}))


def nothing_sent(game: Played) -> None:
    assert all(not update.adapter for update in game.updates)
    assert same(game.after, game.before)
    assert game.report.aggregation_error is None


def shares_a(game: Played) -> None:
    shares(game, frozenset({"A"}))


def shares_b(game: Played) -> None:
    shares(game, frozenset({"B"}))


def shares(game: Played, roles: Roles) -> None:
    """What clients send, and all that the server averages, are their tensors of these roles."""
    sends_what_it_trained(game)
    assert all({role_of(name) for name in u.adapter} == roles for u in game.updates)
    is_mean(game, roles)
    stays(game, ALL - roles)
    assert game.report.aggregation_error is None


def best_factors(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean(game, HEAD)
    hands_out_best_factors(game, game.mean_product())


def best_factors_of_pieces(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean(game, HEAD)
    product = {}
    for layer, matrix in game.mean_product().items():
        product[layer] = torch.zeros_like(matrix)
        downs, ups = ([u.adapter[named(layer, f)] for u in game.updates] for f in "AB")
        for h in range(len(game.before[named(layer, "A")])):  # of one rank after the other
            having = [i for i, down in enumerate(downs) if len(down) > h]
            total = sum(game.infos[i].num_examples for i in having)
            for i in having:
                piece = ups[i][:, h, None] @ downs[i][None, h]
                share = game.infos[i].num_examples / total
                product[layer] += share * game.before.scaling[layer] * piece
    hands_out_best_factors(game, product)


def best_factors_of_sketches(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean(game, HEAD)
    rng, product = generator(game.seed, "aggregate"), {}
    for layer, scaling in game.before.scaling.items():
        downs, ups = ([one[named(layer, f)] for one in game.returned] for f in "AB")
        (rank, width), out = game.before[named(layer, "A")].shape, len(ups[0])
        columns = min(rank + 4, width, out)
        probes = torch.randn(width, columns, generator=rng, dtype=torch.float64)
        both = list(zip(game.weights, ups, downs, strict=True))
        first = sum(p * scaling * (up @ (down @ probes)) for p, up, down in both)
        basis = torch.linalg.svd(torch.as_tensor(first), full_matrices=False).U
        second = sum(p * scaling * (down.mT @ (up.mT @ basis)) for p, up, down in both)
        product[layer] = basis @ torch.as_tensor(second).mT
    hands_out_best_factors(game, product)


def hands_out_best_factors(game: Played, product: Matrices) -> None:
    """Each client receives √S U and √S Vᵀ of the first directions of these products."""
    for info in game.infos:
        view = game.method.download(ServerState(game.after, round=info.round), info)
        for layer, matrix in product.items():
            down, up = view[named(layer, "A")], view[named(layer, "B")]
            rank = min(info.rank, len(game.before[named(layer, "A")]))
            assert down.shape[0] == up.shape[1] == rank
            missed = float((dense(view)[layer] - matrix).norm())
            assert missed == pytest.approx(tail(matrix, rank), rel=1e-6, abs=1e-9)
            assert near({"": down @ down.mT}, {"": up.mT @ up})  # √S in each of them


def stacked(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean_of_products(game)
    for layer in game.before.layers():
        down, up = game.after[named(layer, "A")], game.after[named(layer, "B")]
        assert not up.any()
        assert not torch.equal(down, game.before[named(layer, "A")])
        assert float(down.abs().max()) <= down.shape[1] ** -0.5


def averaged_with_residual(game: Played) -> None:
    averaged(game)
    is_mean_of_products(game)


def padded_and_weighted(game: Played) -> None:
    sends_what_it_trained(game)
    total = {name: torch.zeros_like(tensor) for name, tensor in game.before.items()}
    for weight, update in zip(game.weights, game.updates, strict=True):
        for name, tensor in update.adapter.items():
            for index in itertools.product(*map(range, tensor.shape)):
                total[name][index] += weight * float(tensor[index])
    for layer in game.before.layers():  # a direction that nobody sends keeps its row
        down, up = named(layer, "A"), named(layer, "B")
        for j in range(len(total[down])):
            if not total[down][j].any() and not total[up][:, j].any():
                total[down][j] = game.before[down][j]
    assert near(game.after, total)


def turned_to_rows(game: Played) -> None:
    sends_what_it_trained(game)
    assert all({role_of(n) for n in u.adapter} == {"B", "head"} for u in game.updates)
    is_mean_of_products(game)
    for layer in game.before.layers():
        down, up = game.after[named(layer, "A")], game.after[named(layer, "B")]
        eye = torch.eye(len(down), dtype=down.dtype)
        assert near({"": down @ down.mT}, {"": eye})
        gram = up.mT @ up  # S², largest first
        assert near({"": gram}, {"": gram.diagonal().diag()}, 1e-8)
        assert (gram.diagonal().diff() <= 1e-9 * gram.max()).all()


def largest_pieces(game: Played) -> None:
    is_mean_of_products(game)
    stays(game, frozenset({"A"}) if game.infos[0].round % 2 else frozenset({"B"}))
    moved = "B" if game.infos[0].round % 2 else "A"
    layers = game.before.layers()
    for info, end, update in zip(game.infos, game.trained, game.updates, strict=True):
        scores: dict[tuple[str, int], float] = {}
        for layer in layers:
            change = {f: end[named(layer, f)] - game.before[named(layer, f)] for f in "AB"}
            held = {f: change[f] if f == moved else end[named(layer, f)] for f in "AB"}
            for j in range(len(held["A"])):
                piece = held["B"][:, j, None] @ held["A"][None, j]
                scores[layer, j] = float(piece.norm())
        most = max(1, min(round(0.5 * len(scores)), info.rank * len(layers)))
        chosen = set(sorted(scores, key=lambda key: -scores[key])[:most])
        for layer, j in scores:
            source = end if (layer, j) in chosen else game.before
            name, at = named(layer, moved), (slice(None), j) if moved == "B" else (j,)
            assert torch.equal(update.adapter[name][at], source[name][at])


def corrected(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean(game, frozenset({"A", "head"}))
    mean_b, product = game.mean_sent(frozenset({"B"})), game.mean_product()
    for layer, matrix in product.items():
        down, up = game.after[named(layer, "A")], mean_b[named(layer, "B")]
        missed = matrix / game.before.scaling[layer] - up @ down
        rank = len(down)
        tall = torch.cat([down.mT, 0.01**0.5 * torch.eye(rank, dtype=down.dtype)])
        goal = torch.cat([missed.mT, torch.zeros(rank, missed.shape[0], dtype=down.dtype)])
        wanted = up + torch.linalg.lstsq(tall, goal).solution.mT
        assert near({"": game.after[named(layer, "B")]}, {"": wanted}, 1e-7)


def turned_to_server(game: Played) -> None:
    is_mean(game, frozenset({"A", "B", "head"}))
    keeps_products(game)
    which = "A" if game.infos[0].round % 2 == 0 else "B"
    for end, update in zip(game.trained, game.updates, strict=True):
        for layer in game.before.layers():
            held, was = (s[named(layer, which)] for s in (end, game.before))
            if game.infos[0].round == 1:
                assert torch.equal(update.adapter[named(layer, which)], held)
                continue
            overlap = held @ was.mT if which == "A" else held.mT @ was
            turn = half_way(nearest_turn(overlap))
            wanted = turn.mT @ held if which == "A" else held @ turn
            assert near({"": update.adapter[named(layer, which)]}, {"": wanted}, 1e-7)


def nearest_turn(overlap: Tensor) -> Tensor:
    """The R in SO(r) of largest tr(Rᵀ overlap), by eigenvectors and not by an SVD."""
    values, right = torch.linalg.eigh(overlap.mT @ overlap)
    left = overlap @ right / values.clamp_min(1e-300).sqrt()
    if torch.linalg.det(left @ right.mT) < 0:
        left = torch.cat([-left[:, :1], left[:, 1:]], dim=1)  # the smallest comes first
    turn: Tensor = left @ right.mT
    return turn


def half_way(turn: Tensor) -> Tensor:
    """The orthogonal matrix nearest to (I + turn) / 2: M (MᵀM)^-½."""
    middle = (torch.eye(len(turn), dtype=turn.dtype) + turn) / 2
    values, vectors = torch.linalg.eigh(middle.mT @ middle)
    nearest: Tensor = middle @ vectors @ (values**-0.5).diag() @ vectors.mT
    return nearest


def smoothed(game: Played) -> None:
    averaged(game)
    gradient = game.method.gradient
    assert gradient is not None
    for name, tensor in game.before.items():
        both = torch.stack([tensor, 2 * tensor.flip(0)])
        wanted = both.clone()
        if role_of(name) != "head":
            wide = both if role_of(name) == "A" else both.mT  # (clients, rank, width)
            for client, row, at in itertools.product(*map(range, wide.shape)):
                near_by = [min(max(at + k, 0), wide.shape[2] - 1) for k in (-2, -1, 0, 1, 2)]
                value = (
                    sum(
                        w * wide[client, row, i]
                        for w, i in zip((1, 4, 6, 4, 1), near_by, strict=True)
                    )
                    / 16
                )
                spot = (client, row, at) if role_of(name) == "A" else (client, at, row)
                wanted[spot] = value
        assert near({"": gradient(name, both, {})}, {"": wanted})


def core_averaged(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean_of_products(game)
    is_mean(game, frozenset({"core", "head"}))
    stays(game, frozenset({"A", "B"}))


def folded_cores(game: Played) -> None:
    keeps_products(game)
    is_mean_of_products(game)
    stays(game, frozenset({"A", "B"}))
    for layer in game.before.layers():
        total = torch.zeros_like(game.before[named(layer, "core")])
        for weight, end in zip(game.weights, game.trained, strict=True):
            for head, gain in enumerate(end[named(layer, "gain")].tolist()):
                total[head] += weight * gain * end[named(layer, "core")][head]
        assert near({"": game.after[named(layer, "core")]}, {"": total})
        assert (game.after[named(layer, "gain")] == 1).all()


def kept_up_to_energy(game: Played) -> None:
    sends_what_it_trained(game)
    is_mean(game, HEAD)
    factors_alone = [dense(r.select(lambda name: role_of(name) != "delta")) for r in game.returned]
    for layer, matrix in game.mean_of(factors_alone).items():
        values = torch.linalg.svdvals(matrix).square()
        rank = len(game.before[named(layer, "A")])
        enough = next(
            k for k in range(len(values) + 1) if values[:k].sum() >= 0.9999 * values.sum()
        )
        added = game.after[named(layer, "delta")] - game.before[named(layer, "delta")]
        own = game.after.scaling[layer] * (
            game.after[named(layer, "B")] @ game.after[named(layer, "A")]
        )
        for kept, error in ((rank, matrix - own), (max(rank, enough), matrix - own - added)):
            least = 1e-9 * float(matrix.norm())
            assert float(error.norm()) == pytest.approx(tail(matrix, kept), rel=1e-6, abs=least)


CHECKS: dict[str, Callable[[Played], None]] = {
    name: globals()[row.check] for name, row in ROWS.items()
}
