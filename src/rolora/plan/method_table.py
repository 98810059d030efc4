"""A table of all methods, read off the methods themselves."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace

import torch

from rolora.algorithm.adapter import (
    AdapterState,
    Assignment,
    ClientInfo,
    Roles,
    Specs,
    TensorSpec,
    Update,
    role_of,
)
from rolora.algorithm.codec import body_bytes, encode
from rolora.algorithm.ledger import Arrival, Ledger, after_round, lacking
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.reduce import mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.methods import METHODS, get_method, method_names


@dataclass(frozen=True)
class MethodRow:
    """One method with its default options; the fields are the keys of ``rolora methods --json``.

    Parts of the adapter are written "A", "A+B", "A+B+delta", "core" or "nothing"; the task head
    goes with them. ``trains`` and ``up`` are for rounds 1 and 2; ``down``, for rounds 2 and 3, is
    what travels to a client that took part in the round before. ``keeps``: what is trained but
    never leaves the client. ``exact``: whether the server's product is the mean of the clients'
    products, None if there is no such mean. ``ranks``, ``secure`` and ``averaged`` are
    ``heterogeneous_ranks``, ``sum_only`` and ``supports_server_optimizer`` of
    ``rolora.algorithm.method.Method``. ``options`` are given with their defaults.
    """

    name: str
    trains: tuple[str, str]
    up: tuple[str, str]
    down: tuple[str, str]
    keeps: str
    exact: bool | None
    ranks: bool
    secure: bool
    averaged: bool
    options: tuple[str, ...]
    summary: str
    paper: str


@dataclass(frozen=True)
class Travel:
    """What travels in one round between the server and a client that took part before."""

    up: Roles
    down: Roles
    bytes_up: int
    bytes_down: int


def describe_methods() -> list[MethodRow]:
    """One row per method, in name order."""
    return [_describe(name) for name in method_names()]


def _describe(name: str) -> MethodRow:
    method = get_method(name)
    text = inspect.getdoc(inspect.getmodule(METHODS.factory(name))) or name
    paper = re.search(r"arXiv:[\d.]+\d", text)
    options = METHODS.options(name).values()
    first, second, third = travels(method, 8, 6, 2)
    averages = method.federated and not method.personal_roles
    return MethodRow(
        name=name,
        trains=(_roles(method.trained(1)), _roles(method.trained(2))),
        up=(_roles(first.up), _roles(second.up)),
        down=(_roles(second.down), _roles(third.down)),
        keeps=_roles(method.personal_roles),
        exact=method.exact if averages else None,
        ranks=method.heterogeneous_ranks,
        secure=method.sum_only,
        averaged=method.supports_server_optimizer,
        options=tuple(f"{option.name}={option.default!r}" for option in options),
        summary=text.splitlines()[0].partition(": ")[2] or text.splitlines()[0],
        paper=paper.group() if paper else "",
    )


def travels(method: Method, out: int, width: int, rank: int) -> list[Travel]:
    """Rounds 1, 2 and 3 of two clients, on one adapted layer (out, width) without a task head.

    Clients move at random instead of training; everything else is as in a run. Of a method that is
    no federation nothing travels.
    """
    rng = generator(0, "travels")
    layer = "base_model.model.layer"
    specs = Specs(
        (
            TensorSpec(f"{layer}.lora_A.weight", "A", (rank, width)),
            TensorSpec(f"{layer}.lora_B.weight", "B", (out, rank)),
        ),
        scaling={layer: 1.0},
        head={},
        gradient={layer: torch.randn(out, width, generator=rng)},
    )
    server, ledger, found = ServerState(method.init(specs, rng)), Ledger(), list[Travel]()
    for round in (1, 2, 3):
        infos = [ClientInfo(id, 1, rank, round) for id in ("one", "two")]
        cohort = {info.id: Assignment(info, method.download(server, info)) for info in infos}
        updates = [_update(method, assigned, rng) for assigned in cohort.values()]
        down = lacking(method, server, cohort["one"].received, ledger, ledger.held.get("one"))
        sent = updates[0].adapter
        nothing = Travel(frozenset(), frozenset(), 0, 0)
        up_bytes, down_bytes = updates[0].num_bytes(), down.num_bytes()
        travel = Travel(_parts(sent), _parts(down), up_bytes, down_bytes)
        found.append(travel if method.federated else nothing)
        after, _ = step(method, Aggregation(mean()), server, cohort, updates, rng)
        arrived = [Arrival(one.client, {}, one.num_bytes()) for one in updates]
        ledger, _ = after_round(method, server, after, cohort, ledger, arrived)
        server = after
    return found


def _update(method: Method, assigned: Assignment, rng: torch.Generator) -> Update:
    """What a client sends that has moved everything it trains a little."""
    info, received = assigned.info, assigned.received
    shared = method.shared(info.round)
    moving = received.only(method.trained(info.round))
    trained = received | {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=rng)
        for name, tensor in moving.items()
    }
    sent = method.upload(received, trained, info).only(shared)
    update = Update(info.id, sent, info.num_examples, {})
    if not method.sparse_upload:
        return update
    payload, _ = encode("fp32", sent, received.only(shared), {}, sparse=True)
    return replace(update, encoded_bytes=body_bytes(payload))


def _parts(adapter: AdapterState) -> Roles:
    return frozenset(map(role_of, adapter))


def _roles(roles: Roles) -> str:
    return "+".join(sorted(roles - {"head"})) or "nothing"
