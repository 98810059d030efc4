"""What the methods are, in a table that is read off the methods themselves."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass, replace

import torch

from rolora.algorithm.adapter import (
    AdapterState,
    ClientInfo,
    Roles,
    Specs,
    TensorSpec,
    Update,
    role_of,
)
from rolora.algorithm.codec import body_bytes, encode
from rolora.algorithm.ledger import Arrival, Ledger, after_round, lacking
from rolora.algorithm.method import Method, ServerState, get_method, method_factory, method_names
from rolora.algorithm.reduce import mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step


@dataclass(frozen=True)
class MethodRow:
    """One method as its defaults are; the fields are the keys of ``rolora methods --json``.

    Parts of the adapter are written "A", "A+B", "A+B+delta", "core" or "nothing"; the task head
    goes with them. ``trains`` and ``up`` are of rounds 1 and 2, ``down`` of rounds 2 and 3: what a
    client is sent that took part in the round before. ``keeps``: what is trained and stays at home.
    ``exact``: whether the server's product is the mean of the clients' products, None where there
    is no such mean. ``ranks``, ``secure``, ``averaged``: see ``rolora.algorithm.method.Method``.
    ``options`` with their defaults.
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
    """What went between the server and a client that had taken part before, in one round."""

    up: Roles
    down: Roles
    bytes_up: int
    bytes_down: int


def describe_methods() -> list[MethodRow]:
    """One row per file of ``rolora/methods``, in name order."""
    return [_describe(name) for name in method_names()]


def _describe(name: str) -> MethodRow:
    method = get_method(name)
    text = importlib.import_module(f"rolora.methods.{name}").__doc__ or ""
    paper = re.search(r"arXiv:[\d.]+\d", text)
    parameters = inspect.signature(method_factory(name)).parameters.values()
    first, second, third = travels(method, 8, 6, 2)
    averages = not method.pooled and not method.kept
    return MethodRow(
        name=name,
        trains=(_roles(method.trained(1)), _roles(method.trained(2))),
        up=(_roles(first.up), _roles(second.up)),
        down=(_roles(second.down), _roles(third.down)),
        keeps=_roles(method.kept),
        exact=method.exact if averages else None,
        ranks=method.ranks,
        secure=method.secure,
        averaged=method.averaged,
        options=tuple(f"{p.name}={p.default!r}" for p in parameters),
        summary=text.splitlines()[0].partition(": ")[2] or text.splitlines()[0],
        paper=paper.group() if paper else "",
    )


def travels(method: Method, out: int, width: int, rank: int) -> list[Travel]:
    """Rounds 1, 2 and 3 of two clients, on one adapted layer of these widths, without a task head.

    Training is pretended, all else is what a run does. A pooled method sends nothing: it needs
    everybody's rows in one place.
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
        cohort = {id: ClientInfo(id, 1, rank, round) for id in ("one", "two")}
        updates = [_update(method, server, info, rng) for info in cohort.values()]
        view = method.download(server, cohort["one"])
        down = lacking(method, server, view, ledger, ledger.held.get("one"))
        sent = updates[0].adapter
        nothing = Travel(frozenset(), frozenset(), 0, 0)
        up_bytes, down_bytes = updates[0].num_bytes(), down.num_bytes()
        travel = Travel(_parts(sent), _parts(down), up_bytes, down_bytes)
        found.append(nothing if method.pooled else travel)
        after, _ = step(method, Aggregation(mean()), server, cohort, updates, rng)
        arrived = [Arrival(one.client, {}, one.num_bytes()) for one in updates]
        ledger, _ = after_round(method, server, after, cohort, ledger, arrived)
        server = after
    return found


def _update(method: Method, server: ServerState, info: ClientInfo, rng: torch.Generator) -> Update:
    """What a client sends that has moved everything it trains a little."""
    received, shared = method.download(server, info), method.shared(info.round)
    moving = received.only(method.trained(info.round))
    trained = received | {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=rng)
        for name, tensor in moving.items()
    }
    sent = method.upload(received, trained, info).only(shared)
    update = Update(info.id, sent, info.num_examples, {})
    if not method.sparse:
        return update
    payload, _ = encode("fp32", sent, received.only(shared), AdapterState({}, {}), sparse=True)
    return replace(update, encoded_bytes=body_bytes(payload))


def _parts(adapter: AdapterState) -> Roles:
    return frozenset(map(role_of, adapter))


def _roles(roles: Roles) -> str:
    return "+".join(sorted(roles - {"head"})) or "nothing"
