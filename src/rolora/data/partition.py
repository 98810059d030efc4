"""Who holds which rows: the split of one table over the clients of a simulation.

Every scheme returns shards that are disjoint, never empty, and drawn from the given generator
alone. ``Partition.note`` counts what had to be adjusted.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rolora.errors import DataError

Rows = list[int]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Partition:
    """``shards``: client id, safe as a file name -> row indices, int64 (num_examples,), ascending.

    ``dropped`` rows belong to no client; ``note`` says in a line what was adjusted, else nothing.
    """

    shards: Mapping[str, Tensor]
    dropped: int = 0
    note: str = ""


def iid(num_rows: int, clients: int, rng: torch.Generator, *, min_examples: int = 1) -> Partition:
    """Shuffle the rows and deal them evenly: shard sizes differ by at most one.

    Raises DataError if there are fewer than ``clients * min_examples`` rows.
    """
    _require_enough(num_rows, clients, min_examples)
    order = torch.randperm(num_rows, generator=rng)
    return Partition(_numbered([part.tolist() for part in order.tensor_split(clients)]))


def dirichlet(
    labels: Sequence[Hashable],
    clients: int,
    alpha: float,
    rng: torch.Generator,
    *,
    min_examples: int = 1,
) -> Partition:
    """Split each label's rows by proportions drawn from a symmetric Dirichlet(``alpha``).

    Small ``alpha`` gives each label to few clients, large ``alpha`` approaches :func:`iid`
    (Yurochkin et al. 2019, section 4; Hsu et al. 2019 draw per client instead of per label).
    A client below ``min_examples`` is topped up with random rows of the largest client, so every
    row is held by exactly one client.

    Raises DataError if there are fewer than ``clients * min_examples`` rows.
    """
    _require_enough(len(labels), clients, min_examples)
    shards: list[Rows] = [[] for _ in range(clients)]
    for rows in _rows_by(labels).values():
        shares = symmetric_dirichlet(clients, alpha, rng)
        cuts = (shares.cumsum(0)[:-1] * len(rows)).round().long().clamp(max=len(rows))
        parts = _shuffled(rows, rng).tensor_split(cuts)
        for shard, part in zip(shards, parts, strict=True):
            shard.extend(part.tolist())
    note = _top_up(shards, min_examples, rng)
    return Partition(_numbered(shards), note=note)


def by_label(
    labels: Sequence[Hashable],
    clients: int,
    k: int,
    rng: torch.Generator,
    *,
    min_examples: int = 1,
) -> Partition:
    """Give each client ``k`` labels and deal each label's rows evenly to its holders.

    Clients choose in turn among the labels with the fewest holders so far, so every label is held
    once ``clients * k`` reaches the number of labels; below that, the rows of labels held by nobody
    are dropped and counted (McMahan et al. 2017, section 3, with labels in place of shards).
    A client below ``min_examples`` is topped up with rows of its own labels only.

    Raises DataError if there are fewer than ``k`` labels or too few rows of a client's labels.
    """
    _require_enough(len(labels), clients, min_examples)
    groups = _rows_by(labels)
    if k > len(groups):
        raise DataError(
            f"by_label asks for {k} labels a client, but the data has {len(groups)}: "
            f"choose 1 to {len(groups)}"
        )
    held = _deal_labels(list(groups), clients, k, rng)
    shards: list[Rows] = [[] for _ in range(clients)]
    for label, rows in groups.items():
        holders = [client for client in range(clients) if label in held[client]]
        if not holders:
            continue
        parts = _shuffled(rows, rng).tensor_split(len(holders))
        for client, part in zip(holders, parts, strict=True):
            shards[client].extend(part.tolist())
    notes = []
    unheld = set(groups) - set().union(*held)
    dropped = sum(len(groups[label]) for label in unheld)
    if unheld:
        lost = f"({_count(dropped, 'row')})"
        notes.append(f"{_count(len(unheld), 'label')} held by no client dropped {lost}")
    notes.append(_top_up(shards, min_examples, rng, lambda c, row: labels[row] in held[c]))
    if short := sum(len({labels[row] for row in shard}) < k for shard in shards):
        few = f"fewer than {k} labels (labels with few rows)"
        notes.append(f"{_count(short, 'client')} with rows of {few}")
    return Partition(_numbered(shards), dropped, "; ".join(filter(None, notes)))


def by_field(values: Sequence[str], *, min_examples: int = 1) -> Partition:
    """One client per distinct value, for example a speaker, a hospital, or the file of a row.

    Values with fewer than ``min_examples`` rows are dropped, counted and noted. Raises DataError if
    no value has enough rows.
    """
    groups = _rows_by(values)
    ids = client_ids(groups)
    kept = {ids[v]: rows for v, rows in groups.items() if len(rows) >= min_examples}
    if not kept:
        most = max(map(len, groups.values()), default=0)
        raise DataError(
            f"no client has {_count(min_examples, 'row')} or more ({_count(len(groups), 'value')}, "
            f"at most {_count(most, 'row')} each): lower min_examples or choose another field"
        )
    gone = len(groups) - len(kept)
    dropped = len(values) - sum(map(len, kept.values()))
    note = f"{_count(gone, 'client')} with < {_count(min_examples, 'row')} dropped"
    shards = {client: torch.tensor(kept[client], dtype=torch.int64) for client in sorted(kept)}
    return Partition(shards, dropped, f"{note} ({_count(dropped, 'row')})" if gone else "")


def client_ids(names: Iterable[str]) -> dict[str, str]:
    """name -> id that is safe as a file name and unique, also where case does not count.

    Accents are taken off, other characters outside ``A-Za-z0-9._-`` become ``_``, and what would be
    the same id twice gets ``-2``, ``-3``, ... in the order of the sorted names.
    """
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(set(names)):
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)[:100].strip("._-") or "client"
        candidate, copy = stem, 1
        while candidate.casefold() in taken:
            copy += 1
            candidate = f"{stem}-{copy}"
        taken.add(candidate.casefold())
        ids[name] = candidate
    return ids


def symmetric_dirichlet(size: int, alpha: float, rng: torch.Generator) -> Tensor:
    """One draw of Dirichlet(alpha, ..., alpha): float64 ``(size,)``, non-negative, sums to 1.

    Gamma(alpha) variates underflow to equal values for small alpha, which would turn the most
    skewed split into the most even one. Their logarithms do not: Gamma(alpha) has the law of
    Gamma(alpha + 1) * U ** (1 / alpha) (Marsaglia & Tsang 2000, section 6).
    """
    gamma = torch._standard_gamma(torch.full((size,), alpha + 1.0, dtype=torch.float64), rng)
    uniform = 1.0 - torch.rand(size, generator=rng, dtype=torch.float64)
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=0)


def _require_enough(num_rows: int, clients: int, min_examples: int) -> None:
    if num_rows < clients * min_examples:
        raise DataError(
            f"{_count(num_rows, 'row')} cannot give {_count(clients, 'client')} at least "
            f"{_count(min_examples, 'row')} each: use at most {num_rows // min_examples} clients, "
            "lower min_examples, or use more data"
        )


def _rows_by(keys: Sequence[Key]) -> dict[Key, Rows]:
    groups: dict[Key, Rows] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return groups


def _shuffled(rows: Rows, rng: torch.Generator) -> Tensor:
    return torch.tensor(rows)[torch.randperm(len(rows), generator=rng)]


def _deal_labels(
    labels: list[Hashable], clients: int, k: int, rng: torch.Generator
) -> list[set[Hashable]]:
    """The ``k`` labels of each client; the numbers of holders of two labels differ by at most 1."""
    holders: Counter[int] = Counter()
    held = []
    for _ in range(clients):
        order = torch.randperm(len(labels), generator=rng).tolist()
        chosen = sorted(order, key=lambda index: holders[index])[:k]
        holders.update(chosen)
        held.append({labels[index] for index in chosen})
    return held


def _top_up(
    shards: list[Rows],
    min_examples: int,
    rng: torch.Generator,
    may_hold: Callable[[int, int], bool] = lambda client, row: True,
) -> str:
    """Move rows, in place, to shards that are too small; a note on how many were."""
    small = [client for client, shard in enumerate(shards) if len(shard) < min_examples]
    heap = [(-len(shard), donor) for donor, shard in enumerate(shards) if len(shard) > min_examples]
    heapq.heapify(heap)  # the largest shard first, of equals the first
    for client in small:
        while len(shards[client]) < min_examples:
            passed: list[tuple[int, int]] = []
            rows: Rows = []
            while heap and not rows:
                size, donor = heapq.heappop(heap)
                rows = [row for row in shards[donor] if may_hold(client, row)]
                passed.append((size, donor))
            if not rows:
                raise DataError(
                    f"client {client} gets {_count(len(shards[client]), 'row')} of its labels, "
                    f"below min_examples = {min_examples}, and no other client can spare one: "
                    "use fewer clients, more labels a client, or a lower min_examples"
                )
            row = rows[int(torch.randint(len(rows), (), generator=rng))]
            shards[donor].remove(row)
            shards[client].append(row)
            size, donor = passed.pop()
            if -size - 1 > min_examples:
                passed.append((size + 1, donor))
            for entry in passed:
                heapq.heappush(heap, entry)
    if not small:
        return ""
    return f"{_count(len(small), 'client')} topped up to {_count(min_examples, 'row')}"


def _numbered(shards: list[Rows]) -> dict[str, Tensor]:
    width = max(3, len(str(len(shards) - 1)))
    return {
        f"client-{number:0{width}d}": torch.tensor(sorted(shard), dtype=torch.int64)
        for number, shard in enumerate(shards)
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
