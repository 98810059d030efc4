"""Who attacked a run, and what the server did with each client's updates."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rolora.attacks import NO_ATTACK
from rolora.results.robustness import SUCCESS
from rolora.results.runs import RunRecord

MOSTLY = 0.5  # a client that is cut by more than this counts as cut in a round


@dataclass(frozen=True)
class Cut:
    """How a robust rule treated one client: in ``rounds`` rounds it used its update.

    In those of ``mostly`` it cut it by more than half; ``mean`` is the share cut, over all of them.
    ``attacks``: whether the client is a bad one of an experiment.
    """

    client: str
    rounds: int
    mostly: tuple[int, ...]
    mean: float
    attacks: bool = False

    @property
    def in_most_rounds(self) -> bool:
        """Whether it was mostly cut in more than half of its rounds."""
        return 2 * len(self.mostly) > self.rounds


@dataclass(frozen=True)
class Defence:
    """An attacked or robust run.

    ``bad`` and ``honest``: how many updates of the attackers, and of the others, were stopped, and
    how many there were. Stopped is one that was cut by more than half, or rejected. ``success``:
    how often the attack gets the answers that it is after, at the end, if it is after any.
    """

    rule: str
    attack: str
    attackers: tuple[str, ...]
    bad: tuple[int, int]
    honest: tuple[int, int]
    success: float | None


def attackers(run: RunRecord) -> frozenset[str]:
    """The bad clients of an experiment; empty for a run without an attack."""
    attack = run.config.get("attack", {})
    if attack.get("name", NO_ATTACK) == NO_ATTACK:
        return frozenset()
    from rolora.attacks.attack import bad_clients  # needs torch, and few runs are attacked

    clients = [client["id"] for client in run.partition["clients"]]
    trusted = run.config.get("aggregate", {}).get("trusted")
    return bad_clients(clients, attack["clients"], run.seed, trusted)


def cuts(run: RunRecord) -> list[Cut]:
    """Every client whose updates came, most cut first; empty if the run's rule cuts nobody."""
    shares: dict[str, dict[int, float]] = {}
    for line in run.rounds:
        for client in line["clients"]:
            cut = line["cut"].get(client, 0.0)
            shares.setdefault(client, {})[line["round"]] = cut
    if not any(any(own.values()) for own in shares.values()):
        return []
    bad = attackers(run)
    found = [
        Cut(
            client,
            len(own),
            tuple(round for round, share in own.items() if share > MOSTLY),
            statistics.fmean(own.values()),
            client in bad,
        )
        for client, own in shares.items()
    ]
    return sorted(found, key=lambda one: (-one.mean, one.client))


def defence(run: RunRecord) -> Defence | None:
    """What an attack met; None for a run that neither was attacked nor has a rule against it."""
    bad, rule = attackers(run), _rule(run)
    if not bad and rule == "mean":
        return None
    counts = {True: [0, 0], False: [0, 0]}
    for line in run.rounds:
        for client in {**line["clients"], **line["rejected"]}:
            stopped = client in line["rejected"] or line["cut"].get(client, 0.0) > MOSTLY
            counts[client in bad][0] += stopped
            counts[client in bad][1] += 1
    return Defence(
        rule,
        run.config["attack"]["name"] if bad else "none",
        tuple(sorted(bad)),
        (counts[True][0], counts[True][1]),
        (counts[False][0], counts[False][1]),
        run.last(SUCCESS),
    )


def _rule(run: RunRecord) -> str:
    """'clip to 0.2, nnm, trimmed_mean, against 2': how updates are combined."""
    how = run.config.get("aggregate", {})
    listed = how.get("reducer", "mean")
    names = [listed] if isinstance(listed, str) else list(listed)
    if how.get("clip_norm") is not None and "clip" not in names:
        names.insert(0, f"clip to {how['clip_norm']:g}")
    against = f", against {how['byzantine']}" if how.get("byzantine") else ""
    return ", ".join(names) + against
