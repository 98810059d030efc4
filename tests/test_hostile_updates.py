"""One client of a cohort is hostile: the run goes on, ends finite, and is not that client's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import cohort_of, make_specs, same, sent, start_of, trained, updates_from

from rolora.algorithm.adapter import AdapterState, Failure, Update
from rolora.algorithm.method import Method, Reduce, ServerState
from rolora.algorithm.reduce import Memory, Reducer, Value, mean
from rolora.algorithm.seeding import derived_seed, generator
from rolora.algorithm.step import Aggregation, capped, step
from rolora.errors import NoQuorum
from rolora.methods import get_method, method_names
from rolora.run.folder import RunFolder
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import Federation, RoundResult, RunState, federate

HONEST = {"ann": 5, "bob": 9}
METHODS = [name for name in method_names() if get_method(name).federated]
SHARING = [name for name in METHODS if get_method(name).shared(1)]
Attack = Callable[[Update], Update]


def everywhere(value: float) -> Attack:
    """All that is sent has this value."""

    def attack(update: Update) -> Update:
        tensors = {name: torch.full_like(tensor, value) for name, tensor in update.adapter.items()}
        return replace(update, adapter=AdapterState(tensors, update.adapter.scaling))

    return attack


def once(value: float) -> Attack:
    """One value is this one."""

    def attack(update: Update) -> Update:
        name = min(update.adapter)
        tensor = update.adapter[name].clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[0] = value
        return replace(update, adapter=update.adapter | {name: tensor})

    return attack


ATTACKS: dict[str, tuple[int, Attack]] = {  # what eve joined with, and what she does
    "one huge value": (7, once(3e38)),
    "huge values": (7, everywhere(-3e38)),
    "large values": (7, everywhere(1e19)),  # a square of them overflows
    "not a number": (7, once(math.nan)),
    "no rows": (0, lambda update: update),
    "rows below none": (-14, lambda update: update),  # the weights sum to 0
    "too many rows": (2**62, lambda update: update),
    "more rows than it joined with": (7, lambda update: replace(update, num_examples=2**62)),
}


@dataclass(frozen=True)
class Attacked:
    """Two honest clients that move at random, and eve."""

    size: int
    attack: Attack
    honest: Mapping[str, int]

    def clients(self) -> Mapping[str, int]:
        return {**self.honest, "eve": self.size}

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        for assigned in job.cohort:
            seed = derived_seed(job.seed, job.round, assigned.info.id)
            update = sent(method, assigned, trained(method, assigned, seed))
            yield self.attack(update) if update.client == "eve" else update

    def evaluate(self, method: Method, clients: Iterable[object]) -> Iterator[ClientMetrics]:
        return iter(())


def attacked(
    method: str | Method,
    size: int,
    attack: Attack,
    *,
    honest: Mapping[str, int] = HONEST,
    aggregation: Aggregation | None = None,
) -> Iterator[RoundResult]:
    """A run of four rounds."""
    chosen = get_method(method) if isinstance(method, str) else method
    run = Federation(
        method=chosen,
        engine=Attacked(size, attack, honest),
        rounds=4,
        lr=lambda round: 0.1,
        aggregation=aggregation or Aggregation(mean()),
        ranks=lambda clients: dict.fromkeys(clients, 2),
    )
    specs = make_specs(((4, 6, 2), (7, 9, 2)))
    return federate(run, RunState(ServerState(start_of(chosen, specs, 0, scale=0.3))))


def finite(server: ServerState) -> bool:
    tensors = [*server.adapter.values(), *server.memory.values(), *server.patches.values()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("method", SHARING)
def test_the_run_goes_on_and_ends_as_if_the_hostile_client_had_failed(
    method: str, attack: str
) -> None:
    *_, last = attacked(method, *ATTACKS[attack])
    assert last.round == 4
    assert last.rejected.keys() == {"eve"}
    assert finite(last.state.server)
    assert all(tensor.abs().max() < 100 for tensor in last.state.server.adapter.values())


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_client_alone_changes_nothing_and_the_message_says_what_it_sent(
    attack: str,
) -> None:
    results = attacked("rolora", *ATTACKS[attack], honest={})
    first, *attempts = itertools.islice(results, 4)
    for result in attempts:
        assert same(result.state.server.adapter, first.state.server.adapter)
        assert not result.advanced
        assert result.rejected.keys() == {"eve"}
    with pytest.raises(NoQuorum, match=r"3 attempts \(0 usable updates, and a round needs 1\)"):
        next(results)


# the state that a round ends with


def ending_in(value: Value, memory: Memory) -> Reducer:
    """A reducer that gives this whatever comes."""
    return Reducer(dict, lambda kept, *_: kept, lambda *_: (value, memory))


def one_round(
    method: Method, reducer: Callable[[ServerState], Reducer]
) -> tuple[ServerState, ServerState, str]:
    server = ServerState(start_of(method, make_specs(), 0), attempt=1)
    cohort = cohort_of(method, server, HONEST)
    updates = updates_from(method, cohort)
    after, report = step(
        method, Aggregation(reducer(server)), server, cohort, updates, generator(0)
    )
    assert report.quorum_met == (not report.reason)
    return server, after, report.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e19])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_that_would_end_beyond_bounds_is_not_committed(method: str, value: float) -> None:
    chosen = get_method(method)

    def broken(server: ServerState) -> Reducer:
        plain = mean()

        def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
            found, kept = plain.finish(memory, rng)
            return {name: torch.full_like(t, value) for name, t in found.items()}, kept

        return plain._replace(finish=finish)

    server, after, reason = one_round(chosen, broken)
    if chosen.shared(1):
        assert after == replace(server, attempt=2)
        assert reason


def test_a_server_optimizer_s_memory_that_is_not_finite_is_not_committed() -> None:
    method = get_method("ffa_lora")

    def broken(server: ServerState) -> Reducer:
        shared = server.adapter.only(method.shared(1))
        return ending_in(shared, {"v/x": torch.tensor([1.0, math.inf])})

    server, after, reason = one_round(method, broken)
    assert after == replace(server, attempt=2)
    assert reason == "the server's memory v/x would not be finite"


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_a_round_whose_weights_have_no_sum_is_not_committed(weight: float) -> None:
    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        return replace(server, adapter=server.adapter | reduce(weight=lambda update: weight))

    method = replace(get_method("fedit"), aggregate=aggregate)
    server, after, reason = one_round(method, lambda server: mean())
    assert after == replace(server, attempt=2)
    assert reason == f"the weights of the clients sum to {weight if weight else 0.0}"


# checkpoints


def test_the_last_checkpoint_that_a_round_was_trained_from_outlives_failed_attempts(
    tmp_path: Path,
) -> None:
    """The newest state may be what stops the others: then there is one to go back to."""
    folder = RunFolder.create(tmp_path / "run", "", {}, {})
    state = RunState(ServerState(start_of(get_method("rolora"), make_specs(), 0)))

    def commit(round: int, attempt: int) -> None:
        server = replace(state.server, round=round, attempt=attempt)
        failed = {"advanced": attempt == 0, "reason": "too few" if attempt else ""}
        folder.commit(RoundResult(round, attempt, replace(state, server=server), **failed))  # type: ignore[arg-type]

    for round in range(4):
        commit(round, 0)
    for attempt in range(1, 7):
        commit(3, attempt)
        names = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
        assert names[0] == "round-000002"
        assert len(names) == (2 if attempt == 0 else 3)
    commit(4, 0)
    commit(5, 0)
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == [
        "round-000004",
        "round-000005",
    ]


# weights


@pytest.mark.parametrize("method", SHARING)
def test_a_site_that_claims_most_rows_has_no_larger_share_than_is_allowed(method: str) -> None:
    size = 2**52
    aggregation = Aggregation(mean(), max_share=0.4)
    *_, last = attacked(method, size, everywhere(1.0), aggregation=aggregation)
    # with a share of 1 every tensor sent would now be 1 exactly, as eve sends it
    server = last.state.server.adapter.only(get_method(method).shared(4))
    assert not all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in server.values())


def test_the_share_is_of_the_updates_that_are_used_and_the_error_is_of_the_same_weights() -> None:
    method = get_method("fedit")
    server = ServerState(start_of(method, make_specs(), 0, torch.float64))
    sizes = {"ann": 6, "bob": 3, "cy": 1, "eve": 1000}
    cohort = cohort_of(method, server, sizes)
    ann, bob, cy, eve = updates_from(method, cohort)
    aggregation = Aggregation(mean(), max_share=0.5)
    cases: list[tuple[list[Update | Failure], list[int]]] = [
        ([ann, bob, cy, eve], [6, 3, 1, 10]),
        ([eve, cy, ann, Failure("bob", "offline")], [6, 1, 7]),
        ([eve, bob, Failure("ann", "offline"), Failure("cy", "offline")], [3, 3]),
    ]
    for updates, weights in cases:
        after, report = step(method, aggregation, server, cohort, updates, generator(0))
        used = sorted((one for one in updates if isinstance(one, Update)), key=lambda u: u.client)
        for name, tensor in after.adapter.items():
            parts = [w * u.adapter[name] for w, u in zip(weights, used, strict=True)]
            torch.testing.assert_close(tensor, sum(parts) / sum(weights))
        honest = {
            u.client: replace(cohort[u.client].info, num_examples=w)
            for w, u in zip(weights, used, strict=True)
        }
        plain = {name: replace(cohort[name], info=info) for name, info in honest.items()}
        alike = [replace(u, num_examples=honest[u.client].num_examples) for u in used]
        _, expected = step(method, Aggregation(mean()), server, plain, alike, generator(0))
        assert report.aggregation_error == pytest.approx(expected.aggregation_error, rel=1e-9)
        assert report.aggregation_error


@settings(max_examples=200, derandomize=True)
@given(
    weights=st.lists(st.integers(1, 2**53 - 1) | st.integers(1, 20), min_size=1, max_size=9),
    most=st.floats(0.01, 1),
    rng=st.randoms(use_true_random=False),
)
def test_no_weight_is_above_the_share_and_others_keep_theirs_in_any_order(
    weights: list[int], most: float, rng: object
) -> None:
    found = capped([float(weight) for weight in weights], most)
    total = math.fsum(found)
    share = max(most, 1 / len(weights))
    assert all(0 < weight <= share * total * (1 + 1e-9) for weight in found)
    turned = list(range(len(weights)))
    rng.shuffle(turned)  # type: ignore[attr-defined]
    assert capped([float(weights[i]) for i in turned], most) == [found[i] for i in turned]
    if most * len(weights) > 1:
        lowered = [i for i, weight in enumerate(weights) if found[i] < weight]
        assert all(found[i] == weight for i, weight in enumerate(weights) if i not in lowered)
        assert all(found[i] >= share * total * (1 - 1e-6) for i in lowered)


def test_weights_that_nobody_exceeds_are_as_they_were() -> None:
    assert capped([3.0, 2.0, 1.0], 0.5) == [3.0, 2.0, 1.0]
    assert capped([9.0, 2.0, 1.0], 0.5) == [3.0, 2.0, 1.0]
    assert capped([9.0, 2.0], 0.25) == [1.0, 1.0]
    assert capped([], 0.5) == []
