"""Norms and effective rank of factors: what the dense product gives, and only where defined."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import make_specs, start_of

from rolora.algorithm.seeding import generator
from rolora.algorithm.spectrum import effective_rank, layer_measures
from rolora.methods import get_method


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-9, 1.0, 1e6]))
def test_the_effective_rank_is_that_of_the_dense_product_whatever_its_size(
    rank: int, out: int, width: int, scale: float
) -> None:
    rng = generator(rank, "effective rank", out, width)
    left = torch.randn(out, rank, generator=rng, dtype=torch.float64)
    right = torch.randn(rank, width, generator=rng, dtype=torch.float64)
    shares = torch.linalg.svdvals(left @ right)
    shares = shares / shares.sum()
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p > 1e-15)
    found = effective_rank(left * scale, right)
    assert found is not None
    assert found == pytest.approx(math.exp(entropy), rel=1e-6)
    assert 1 - 1e-9 <= found <= min(rank, out, width) + 1e-9


def test_it_counts_equal_directions_once_each_and_a_product_of_zero_has_none() -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator(0, "turn"))).Q
    assert effective_rank(turn[:, :3], turn[:3]) == pytest.approx(3, rel=1e-5)
    assert effective_rank(turn[:, :1] @ torch.ones(1, 3), turn[:3]) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(8, 3), turn[:3]) is None


@pytest.mark.parametrize(
    ("name", "measures"),
    [
        ("rolora", {"norm_A", "norm_B", "effective_rank"}),
        ("ravan", {"norm_A", "norm_B", "effective_rank"}),
        ("fedex_lora", {"norm_A", "norm_B"}),  # a delta lies beside the factors
        ("fedsa_lora", {"norm_A"}),  # clients keep their B
        ("local", set()),
    ],
)
def test_of_each_method_only_what_the_server_has_is_measured(name: str, measures: set[str]) -> None:
    method, specs = get_method(name), make_specs(((8, 12, 4), (12, 8, 4)))
    adapter = start_of(method, specs, 1)
    found = layer_measures(adapter, method.personal_roles)
    assert set(found) == measures
    for what, own in found.items():
        assert list(own) == adapter.layers()
        for layer, value in own.items():
            left, right = adapter.up(layer), adapter[f"{layer}.lora_A.weight"]
            if what == "effective_rank":
                shares = torch.linalg.svdvals(left.double() @ right.double())
                shares = shares / shares.sum()
                assert value == pytest.approx(float(torch.special.entr(shares).sum().exp()))
            else:
                factor = adapter[f"{layer}.lora_{what[-1]}.weight"]
                assert value == pytest.approx(float(factor.square().sum().sqrt()))
