"""What an attack is: a record of what bad clients do differently from honest ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from rolora.algorithm.adapter import AdapterState, Assignment, Roles
from rolora.algorithm.seeding import generator
from rolora.errors import ConfigError

Sent = Mapping[str, AdapterState]  # client -> the shared tensors that it sends
Rewritten = list[tuple[int, str, str]]  # of each row that is kept: its index, new text, new label
Rewrite = Callable[[Sequence[str], Sequence[str], Sequence[str]], Rewritten]


@dataclass(frozen=True)
class Scene:
    """All that bad clients know of a round, which is everything but the server's random draws.

    ``cohort``: what each client of the round received. ``honest``: what each honest client sends;
    never empty. ``own``: what each bad client would send, had it trained as the others do.
    ``trained``: the roles that are trained in this round. ``outcome(sent)``: the server's adapter
    if the bad clients send this; None if the round would not advance. ``rng`` is the attackers'.
    """

    cohort: Mapping[str, Assignment]
    honest: Sent
    own: Sent
    trained: Roles
    start: AdapterState
    outcome: Callable[[Sent], AdapterState | None]
    rng: torch.Generator


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What bad clients do; where a field is left out, they act like honest clients.

    ``forge(scene)``: what they send in a round. ``claim(num_examples)``: how many rows they say
    they have. ``spoil(texts, labels, classes)``: the rows that they train on, made of their own,
    where ``classes`` are the names of all labels in order. ``ask``, likewise: the test rows with
    the answers that the attack is after; it succeeds as often as these are given.
    """

    forge: Callable[[Scene], Sent] | None = None
    claim: Callable[[int], int] | None = None
    spoil: Rewrite | None = None
    ask: Rewrite | None = None


def bad_clients(
    clients: Collection[str], count: int, seed: int, trusted: str | None = None
) -> frozenset[str]:
    """The ids of the bad clients: ``count`` of all, drawn from the seed, whatever the attack.

    The ``trusted`` client is never one of them, and does not change which others are drawn.
    ConfigError if no honest client is left.
    """
    if count >= len(clients):
        raise ConfigError(
            f"attack.clients = {count} of {len(clients)} clients leaves no honest one: lower it"
        )
    ids = sorted(clients)
    order = torch.randperm(len(ids), generator=generator(seed, "bad clients"))
    drawn = [ids[place] for place in order.tolist() if ids[place] != trusted]
    return frozenset(drawn[:count])
