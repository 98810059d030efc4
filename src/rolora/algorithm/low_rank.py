"""A matrix as a sum of low-rank terms, such as a sum of products of LoRA factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Term = tuple[float, Tensor, Tensor]


class LowRank:
    """A matrix (out, in) kept as a sum of terms: weight · left (out, r) @ right (r, in).

    Sums concatenate their terms, and are compacted once they are larger than the dense matrix.
    Norms go through float64 QR factors, which keep the digits of a small difference of large
    products; a Gram matrix would lose them.
    """

    def __init__(self, terms: Iterable[Term], rank: int | None = None) -> None:
        self.terms: tuple[Term, ...] = tuple(terms)
        widths = (t[2].shape[0] for t in self.terms)
        self.rank: int = sum(widths) if rank is None else rank

    def __add__(self, other: LowRank) -> LowRank:
        total = LowRank(self.terms + other.terms, self.rank + other.rank)
        return total.compact() if total.rank > 2 * min(total.shape) else total

    def __sub__(self, other: LowRank) -> LowRank:
        return self + other * -1.0

    def __mul__(self, factor: float) -> LowRank:
        terms = ((weight * factor, left, right) for weight, left, right in self.terms)
        return LowRank(terms, self.rank)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); (0, 0) for a sum of no terms."""
        if not self.terms:
            return (0, 0)
        _, left, right = self.terms[0]
        return (left.shape[0], right.shape[1])

    def dense(self) -> Tensor:
        """The matrix multiplied out, float64 (out, in)."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for weight, left, right in self.terms:
            total.addmm_(left.double(), right.double(), alpha=weight)
        return total

    def compact(self) -> LowRank:
        """The same matrix, with terms that have an equal factor merged into one.

        Clients that hold the same frozen A differ only in B: their sum is one term, and what
        cancels in exact arithmetic cancels before any product is formed.
        """
        lefts = _numbered([left for _, left, _ in self.terms])
        rights = _numbered([right for _, _, right in self.terms])
        keys = list(zip(lefts, rights, strict=True))
        same: dict[tuple[int, int], Term] = {}
        for key, (weight, left, right) in zip(keys, self.terms, strict=True):
            same[key] = (same[key][0] + weight if key in same else weight, left, right)
        by_left = len({left for left, _ in same}) < len({right for _, right in same})
        groups: dict[int, list[Term]] = {}
        for key, term in same.items():
            groups.setdefault(key[0 if by_left else 1], []).append(term)
        merged = LowRank(_merged(terms, by_left) for terms in groups.values())
        if merged.rank <= 2 * min(self.shape):
            return merged
        whole, (out, width) = merged.dense(), self.shape
        pair = (whole, torch.eye(width)) if width <= out else (torch.eye(out), whole)
        return LowRank([(1.0, *pair)])

    def norm(self) -> float:
        """Frobenius norm, in float64."""
        terms = self.compact().terms
        if not terms:
            return 0.0
        left = torch.cat([weight * left.double() for weight, left, _ in terms], dim=1)
        right = torch.cat([right.double() for _, _, right in terms], dim=0)
        return float(torch.linalg.matrix_norm(small_product(left, right)))


def _numbered(tensors: Sequence[Tensor]) -> list[int]:
    """A number for each tensor, the same for equal tensors.

    Only tensors with the same shape and the same last element are compared; nothing is hashed.
    """
    kinds: dict[tuple[torch.Size, float], list[int]] = {}
    numbers: list[int] = []
    for index, tensor in enumerate(tensors):
        alike = kinds.setdefault((tensor.shape, tensor[-1, -1].item()), [])
        found = next((i for i in alike if equal(tensors[i], tensor)), index)
        if found == index:
            alike.append(index)
        numbers.append(found)
    return numbers


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and values are the same; shared tensors need no comparison."""
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def small_product(left: Tensor, right: Tensor) -> Tensor:
    """R_L R_Rᵀ (r, r), which has the singular values of left (out, r) · right (r, in); float64.

    With left = Q_L R_L and rightᵀ = Q_R R_R, so nothing of size (out, in) is formed.
    """
    one, other = (torch.linalg.qr(side.double(), mode="r").R for side in (left, right.T))
    small: Tensor = one @ other.T
    return small


def one_term(matrix: Tensor) -> Term:
    """A matrix (out, in) as one term."""
    return 1.0, matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype)


def _merged(terms: Sequence[Term], by_left: bool) -> Term:
    """The sum of terms that all have the same left factor, or all the same right factor."""
    if by_left:
        return 1.0, terms[0][1], torch.stack([w * right.double() for w, _, right in terms]).sum(0)
    return 1.0, torch.stack([w * left.double() for w, left, _ in terms]).sum(0), terms[0][2]
