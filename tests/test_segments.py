"""Claims about per-client products: each client's rows meet its own weight and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_clients import Bench, classifier
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rolora.algorithm.adapter import Roles
from rolora.model import segments
from rolora.model.segments import add_low_rank, segment_linear
from rolora.training.settings import LocalSettings

SIZES = (3, 1, 5)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, generator=rng, dtype=dtype)
    return x, torch.randn(3, 4, 6, generator=rng, dtype=dtype)


def test_every_row_meets_the_weight_of_its_own_client() -> None:
    x, weight = example()
    owner = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    expected = torch.einsum("ni,noi->no", x, weight[owner])
    assert torch.allclose(segment_linear(x, weight, SIZES), expected, rtol=1e-12)
    shaped = segment_linear(x.view(1, 9, 6), weight, SIZES)
    assert torch.allclose(shaped, expected.view(1, 9, 4), rtol=1e-12)


def test_its_gradients_are_those_of_the_product() -> None:
    x, weight = example()
    both = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: segment_linear(x, w, SIZES), both)


Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def factors(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Factors:
    """y (n, 5), x (n, 6), and rank-2 factors of each client."""
    rng = torch.Generator().manual_seed(2)
    shapes = ((sum(sizes), 5), (sum(sizes), 6), (len(sizes), 2, 6), (len(sizes), 5, 2))
    y, x, a, b = (torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes)
    return y, x, a, b


LAYOUTS = [SIZES, (4,), (16, 16)]  # uneven, one client, and one batched product


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_low_rank_part_is_each_clients_b_times_a_times_x_scaled(sizes: tuple[int, ...]) -> None:
    y, x, a, b = factors(sizes)
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    expected = y + 0.5 * torch.einsum("nor,nri,ni->no", b[owner], a[owner], x)
    assert torch.allclose(add_low_rank(y, x, a, b, 0.5, sizes), expected, rtol=1e-12)
    rows = add_low_rank(y.unsqueeze(0), x.unsqueeze(0), a, b, 0.5, sizes)
    assert torch.allclose(rows, expected.unsqueeze(0), rtol=1e-12)


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("trained", ["A", "B", "AB"])
def test_gradients_of_the_low_rank_part_are_right_in_every_phase(
    sizes: tuple[int, ...], trained: str
) -> None:
    y, x, a, b = (tensor.requires_grad_() for tensor in factors(sizes))
    a.requires_grad_("A" in trained)
    b.requires_grad_("B" in trained)

    def result(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return add_low_rank(y, x, a, b, 0.5, sizes)

    assert torch.autograd.gradcheck(result, (y, x, a, b))


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_a_bfloat16_layer_keeps_its_dtype_and_float32_factors_get_float32_gradients(
    sizes: tuple[int, ...],
) -> None:
    y, x, a, b = factors(sizes, torch.float32)
    a.requires_grad_()
    b.requires_grad_()
    out = add_low_rank(y.bfloat16(), x.bfloat16().requires_grad_(), a, b, 0.5, sizes)
    exact = add_low_rank(y, x.bfloat16().float(), a, b, 0.5, sizes)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), exact, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.sum(), (a, b))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_the_one_call_for_a_gpu_gives_what_the_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    x, weight = example(torch.float32)
    x, weight = x.repeat(1, 2)[:, :8].contiguous(), weight.repeat(1, 1, 2)[:, :, :8].contiguous()
    grads = []
    for whole in (False, True):
        monkeypatch.setattr(segments, "grouped", lambda *_, whole=whole: whole)
        inputs = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        out = segment_linear(*inputs, SIZES)
        grads.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def kept(roles: Roles, bench: Bench) -> int:
    """Bytes that one step keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        settings = LocalSettings(steps=1, batch_size=8)
        bench.train(bench.work(settings), settings, lambda step: roles)
    return sum(sizes.values())


def test_a_round_that_trains_b_keeps_less_than_one_that_trains_a(tmp_path: Path) -> None:
    bench = classifier(tiny.tiny_bert(tmp_path / "model"), target_modules=("all-linear",))
    assert kept(frozenset({"B"}), bench) < 0.9 * kept(frozenset({"A"}), bench)


def test_the_same_clients_in_the_same_pass_are_the_same_bits_again(tmp_path: Path) -> None:
    bench = classifier(tiny.tiny_bert(tmp_path / "model"), torch.float32)
    settings = LocalSettings(steps=2, batch_size=4)
    first, again = (bench.train(bench.work(settings), settings) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        for tensor in one.adapter:
            assert torch.equal(one.adapter[tensor], other.adapter[tensor]), tensor
