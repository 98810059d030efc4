"""Every scheme: disjoint, never empty, reproducible, and skewed as its source says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.algorithm.seeding import generator
from rolora.data.partition import (
    Partition,
    by_field,
    by_label,
    client_ids,
    dirichlet,
    iid,
    symmetric_dirichlet,
)
from rolora.errors import DataError

LABELS = [row % 5 for row in range(200)]
SPEAKERS = ["Ross", "Monica", "Ross", "Gunther", "Monica", "Ross"]

SCHEMES: dict[str, Callable[[int], Partition]] = {
    "iid": lambda seed: iid(200, 7, generator(seed)),
    "dirichlet": lambda seed: dirichlet(LABELS, 7, 0.1, generator(seed), min_examples=3),
    "by_label": lambda seed: by_label(LABELS, 7, 2, generator(seed)),
    "by_label, too few clients": lambda seed: by_label(LABELS, 2, 2, generator(seed)),
}


def rows_of(partition: Partition) -> list[int]:
    return sorted(row for shard in partition.shards.values() for row in shard.tolist())


def sizes(partition: Partition) -> list[int]:
    return [len(shard) for shard in partition.shards.values()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_row_is_in_one_shard_or_counted_as_dropped(scheme: str) -> None:
    partition = SCHEMES[scheme](0)
    rows = rows_of(partition)
    assert len(rows) == len(set(rows)) == 200 - partition.dropped
    assert set(rows) <= set(range(200))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_are_ascending_int64_under_ids_in_order(scheme: str) -> None:
    shards = SCHEMES[scheme](0).shards
    assert list(shards) == [f"client-{number:03d}" for number in range(len(shards))]
    for shard in shards.values():
        assert shard.dtype == torch.int64
        assert shard.ndim == 1
        assert len(shard) > 0
        assert torch.equal(shard, shard.sort().values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seed_fixes_the_split_and_another_seed_changes_it(scheme: str) -> None:
    torch.manual_seed(1)
    first = SCHEMES[scheme](0).shards
    torch.manual_seed(2)
    again, other = SCHEMES[scheme](0).shards, SCHEMES[scheme](1).shards
    assert all(torch.equal(first[client], again[client]) for client in first)
    assert any(not torch.equal(first[client], other[client]) for client in first)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    clients=st.integers(1, 8),
    alpha=st.sampled_from([1e-8, 0.05, 1.0, 1e4]),
    min_examples=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_dirichlet_keeps_every_row_and_the_minimum_whatever_the_data(
    labels: list[int], clients: int, alpha: float, min_examples: int, seed: int
) -> None:
    if len(labels) < clients * min_examples:
        with pytest.raises(DataError):
            dirichlet(labels, clients, alpha, generator(seed), min_examples=min_examples)
        return
    partition = dirichlet(labels, clients, alpha, generator(seed), min_examples=min_examples)
    assert rows_of(partition) == list(range(len(labels)))
    assert len(partition.shards) == clients
    assert min(sizes(partition)) >= min_examples


def test_iid_shard_sizes_differ_by_at_most_one() -> None:
    assert sorted(sizes(iid(23, 5, generator(0)))) == [4, 4, 5, 5, 5]


def test_ids_are_padded_to_the_width_that_the_number_of_clients_needs() -> None:
    shards = iid(1200, 1001, generator(0)).shards
    assert list(shards)[:2] == ["client-0000", "client-0001"]
    assert list(shards) == sorted(shards)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0, 20.0])
def test_the_dirichlet_draw_has_the_second_moment_of_the_distribution(alpha: float) -> None:
    rng = generator(0)
    draws = torch.stack([symmetric_dirichlet(5, alpha, rng) for _ in range(4000)])
    assert torch.allclose(draws.sum(1), torch.ones(4000, dtype=torch.float64))
    expected = (alpha + 1) / (5 * alpha + 1)  # E[sum p^2] of the symmetric Dirichlet, 5 parts
    assert draws.square().sum(1).mean().item() == pytest.approx(expected, rel=0.03)
    assert draws.mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.03)


def test_a_vanishing_alpha_gives_a_whole_label_to_one_client_and_not_always_the_same() -> None:
    partition = dirichlet(LABELS, 20, 1e-9, generator(0))
    owners = {
        label: Counter(
            client
            for client, shard in partition.shards.items()
            for row in shard.tolist()
            if LABELS[row] == label
        ).most_common(1)[0]
        for label in range(5)
    }
    # 40 rows a label, less what topped up the 15 clients that drew none.
    assert all(rows >= 40 - 15 for _, rows in owners.values())
    assert len({client for client, _ in owners.values()}) > 1


def test_a_smaller_alpha_makes_label_shares_more_skewed() -> None:
    def skew(alpha: float) -> float:
        shards = dirichlet(LABELS, 5, alpha, generator(0)).shards.values()
        shares = [max(Counter(LABELS[row] for row in s.tolist()).values()) / len(s) for s in shards]
        return sum(shares) / len(shares)

    assert skew(0.05) > skew(1.0) > skew(1000.0)
    assert skew(1000.0) == pytest.approx(0.2, abs=0.05)


def test_a_client_below_min_examples_is_topped_up_from_the_largest() -> None:
    without = dirichlet([0] * 30, 3, 0.01, generator(0))
    partition = dirichlet([0] * 30, 3, 0.01, generator(0), min_examples=4)
    assert sizes(without).count(28) == 1
    assert sorted(sizes(partition)) == [4, 4, 22]
    assert partition.note == "2 clients topped up to 4 rows"


def test_top_up_takes_from_no_client_but_the_largest() -> None:
    # 1 client drew too little; the middle one could spare rows too, and keeps its own.
    before = dirichlet([0] * 100, 3, 0.4, generator(2)).shards
    after = dirichlet([0] * 100, 3, 0.4, generator(2), min_examples=8).shards
    small, middle, large = sorted(before, key=lambda client: len(before[client]))
    assert len(before[small]) < 8 < len(before[middle]) < len(before[large])
    assert torch.equal(after[middle], before[middle])
    assert len(after[small]) == 8


def test_nothing_is_noted_when_nothing_was_adjusted() -> None:
    assert dirichlet(LABELS, 2, 100.0, generator(0)).note == ""
    assert by_label(LABELS, 5, 2, generator(0)).note == ""
    assert by_field(SPEAKERS).note == ""


@pytest.mark.parametrize(("clients", "k"), [(5, 1), (5, 2), (20, 3), (3, 2), (1, 5)])
def test_by_label_gives_each_client_k_labels_and_leaves_no_label_out(clients: int, k: int) -> None:
    partition = by_label(LABELS, clients, k, generator(3))
    held = [{LABELS[row] for row in shard.tolist()} for shard in partition.shards.values()]
    assert [len(labels) for labels in held] == [k] * clients
    assert set().union(*held) == set(range(5))
    assert partition.dropped == 0


def test_by_label_deals_a_label_evenly_to_its_holders() -> None:
    partition = by_label(LABELS, 10, 2, generator(0))
    for label in range(5):
        counts = [
            sum(LABELS[row] == label for row in s.tolist()) for s in partition.shards.values()
        ]
        assert sorted(counts) == [0] * 6 + [10] * 4


def test_rows_of_labels_that_nobody_holds_are_dropped_and_counted() -> None:
    partition = by_label(LABELS, 3, 1, generator(0))
    assert partition.dropped == 80
    assert partition.note == "2 labels held by no client dropped (80 rows)"


def test_by_label_tops_up_with_a_clients_own_labels_only() -> None:
    # "b" has 3 rows for 2 holders, so its second holder needs one of the 1st, or a row of "a".
    labels = ["a"] * 20 + ["b"] * 3
    for seed in range(20):
        partition = by_label(labels, 4, 1, generator(seed))
        assert all(
            len({labels[row] for row in shard.tolist()}) == 1 for shard in partition.shards.values()
        )
        with pytest.raises(DataError, match="of its labels, below min_examples = 2"):
            by_label(labels, 4, 1, generator(seed), min_examples=2)


def test_by_label_moves_a_row_of_the_same_label_to_a_holder_that_got_too_few() -> None:
    # Every client holds both labels; the last holder gets none of the single "b".
    partition = by_label(["a"] * 7 + ["b"], 4, 2, generator(0), min_examples=2)
    assert sizes(partition) == [2, 2, 2, 2]
    assert partition.note == (
        "1 client topped up to 2 rows; 3 clients with rows of fewer than 2 labels "
        "(labels with few rows)"
    )


def test_by_label_refuses_more_labels_a_client_than_there_are() -> None:
    with pytest.raises(DataError, match="asks for 6 labels a client, but the data has 5"):
        by_label(LABELS, 3, 6, generator(0))


def test_by_field_gives_one_client_per_value() -> None:
    shards = by_field(SPEAKERS).shards
    assert {client: rows.tolist() for client, rows in shards.items()} == {
        "Gunther": [3],
        "Monica": [1, 4],
        "Ross": [0, 2, 5],
    }
    assert list(shards) == sorted(shards)


def test_values_with_too_few_rows_are_dropped_counted_and_noted() -> None:
    partition = by_field(SPEAKERS, min_examples=3)
    assert list(partition.shards) == ["Ross"]
    assert partition.dropped == 3
    assert partition.note == "2 clients with < 3 rows dropped (3 rows)"


def test_by_field_refuses_when_no_value_has_enough_rows() -> None:
    with pytest.raises(DataError, match=r"no client has 9 rows or more \(3 values, at most 3 rows"):
        by_field(SPEAKERS, min_examples=9)


def test_client_ids_are_safe_file_names_and_stay_apart() -> None:
    names = ["../etc", "Zoë", "zoe", "ward 3/B", "ward 3:B", "ward_3_B-2", "医院", "", ".."]
    ids = client_ids(names)
    assert ids["Zoë"] != ids["zoe"]
    assert len({own.casefold() for own in ids.values()}) == len(names)
    for own in ids.values():
        assert set(own) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert own.strip(".")
    assert ids["ward 3/B"] == "ward_3_B"


def test_client_ids_do_not_depend_on_the_order_of_the_names() -> None:
    assert client_ids(["a/b", "a:b", "a b"]) == client_ids(["a b", "a:b", "a/b"])


@pytest.mark.parametrize(
    "split",
    [
        lambda: iid(10, 6, generator(0), min_examples=2),
        lambda: dirichlet([0] * 10, 6, 1.0, generator(0), min_examples=2),
        lambda: by_label([0, 1] * 5, 6, 1, generator(0), min_examples=2),
    ],
)
def test_too_few_rows_are_refused_with_the_numbers_and_a_way_out(
    split: Callable[[], Partition],
) -> None:
    with pytest.raises(DataError) as caught:
        split()
    assert str(caught.value) == (
        "10 rows cannot give 6 clients at least 2 rows each: use at most 5 clients, "
        "lower min_examples, or use more data"
    )
