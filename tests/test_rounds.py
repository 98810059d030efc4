"""The round loop, with clients that only pretend to train: cohorts, bytes, retries, stopping."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from states import make_specs, moved, relative, same, sent, start_of, trained
from torch import Tensor

from rolora.algorithm.adapter import (
    AdapterState,
    Assignment,
    ClientInfo,
    Failure,
    Roles,
    Update,
    layer_of,
    role_of,
)
from rolora.algorithm.method import Method, ServerState, freeze_head
from rolora.algorithm.patches import applied
from rolora.algorithm.reduce import clip, mean
from rolora.algorithm.seeding import derived_seed
from rolora.algorithm.step import Aggregation
from rolora.config.schema import TrainConfig
from rolora.errors import ConfigError, NoQuorum
from rolora.methods import get_method, method_names
from rolora.methods.centralized import POOL
from rolora.run.folder import line
from rolora.training.engine import ClientMetrics, Evaluation, Job
from rolora.training.rounds import (
    Federation,
    RoundResult,
    RunState,
    cohort_size,
    federate,
    sample_cohort,
)

CLIENTS = {"ann": 5, "bob": 9, "cy": 9, "dee": 2, "eve": 4, "flo": 7}
SPECS = make_specs(((4, 6, 2), (7, 9, 2)))
A, B, HEAD = 4 * (2 * 6 + 2 * 9), 4 * (4 * 2 + 7 * 2), 4 * (3 * 4 + 3)  # bytes in float32
Broken = Callable[[int, int, str], bool]  # round, attempt, client


@dataclass(frozen=True)
class Pretended:
    """Clients that move what they train at random; ``broken`` ones fail. Keeps what it is asked."""

    broken: Broken = lambda round, attempt, client: False
    jobs: list[Job] = field(default_factory=list)
    members: Mapping[str, int] = field(default_factory=lambda: CLIENTS)

    def clients(self) -> Mapping[str, int]:
        return self.members

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        self.jobs.append(job)
        for assigned in job.cohort:
            client = assigned.info
            if self.broken(job.round, job.server.attempt, client.id):
                yield Failure(client.id, "offline")
                continue
            seed = derived_seed(job.seed, job.round, client.id)
            update = sent(method, assigned, trained(method, assigned, seed))
            yield replace(update, metrics={"loss": float(client.num_examples)})

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        for client in (assigned.info for assigned in clients):
            found = {"accuracy": client.num_examples + client.round / 100}
            personal = bool(method.personal(1))
            held_out = found if client.id != "ann" else {}  # ann is too small for held-out rows
            yield ClientMetrics(client.id, held_out, Evaluation(found if personal else {}))


def federation(method: str | Method = "rolora", **changes: Any) -> Federation:
    chosen = get_method(method) if isinstance(method, str) else method
    engine = Pretended(members=changes.pop("clients", CLIENTS))
    plain = Federation(
        method=chosen,
        engine=engine,
        aggregation=Aggregation(mean()),
        ranks=lambda clients: dict.fromkeys(clients, 2),
        seed=3,
        rounds=6,
        lr=lambda round: 0.1 / round,
    )
    return replace(plain, **changes)


def start(method: Method | None = None) -> RunState:
    return RunState(ServerState(start_of(method or get_method("rolora"), SPECS, 0)))


def play(run: Federation, state: RunState | None = None) -> list[RoundResult]:
    return list(federate(run, state or start(run.method)))


def scores(by_round: Mapping[int, float], metric: str = "accuracy") -> Callable[..., Any]:
    """A measure that gives these values, one a call, from round 0 on."""
    values = iter(by_round[round] for round in sorted(by_round))
    return lambda adapter: {metric: next(values)}


def measured(
    test: Callable[..., Any] = lambda _: {}, validation: Callable[..., Any] = lambda _: {}
) -> Callable[[AdapterState], Evaluation]:
    return lambda adapter: Evaluation(test(adapter), validation(adapter))


# what travels


@pytest.mark.parametrize(
    ("method", "up"),
    [
        (get_method("rolora"), [B + HEAD, A + HEAD] * 3),
        (get_method("rolora", first="A"), [A + HEAD, B + HEAD] * 3),
        (freeze_head(get_method("rolora")), [B, A] * 3),
        (get_method("ffa_lora"), [B + HEAD] * 6),
        (get_method("fedit"), [A + B + HEAD] * 6),
        (freeze_head(get_method("fedit")), [A + B] * 6),
        (get_method("local"), [0] * 6),
        (get_method("centralized"), [0] * 6),
    ],
)
def test_up_travels_what_is_shared_to_the_byte(method: Method, up: list[int]) -> None:
    first, *results = play(federation(method))
    assert (first.bytes_up, first.bytes_down) == (0, 0)
    assert [result.bytes_up for result in results] == [len(CLIENTS) * each for each in up]


def test_of_an_encoded_upload_the_bytes_that_travelled_are_counted() -> None:
    class Encoded(Pretended):
        def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
            for reply in super().run(method, job):
                yield replace(reply, encoded_bytes=17) if isinstance(reply, Update) else reply

    _, *results = play(federation("fedit", engine=Encoded()))
    assert [result.bytes_up for result in results] == [17 * len(CLIENTS)] * 6


@pytest.mark.parametrize(
    ("method", "later"),
    [
        (get_method("rolora"), [B + HEAD, A + HEAD] * 2),
        (freeze_head(get_method("rolora")), [B, A] * 2),
        (get_method("ffa_lora"), [B + HEAD] * 4),
        (get_method("fedit"), [A + B + HEAD] * 4),
        (get_method("local"), [0] * 4),
    ],
)
def test_down_travels_everything_once_and_then_only_what_the_last_round_averaged(
    method: Method, later: list[int]
) -> None:
    _, *results = play(federation(method, rounds=5))
    each = [result.bytes_down / len(CLIENTS) for result in results]
    assert each == [A + B + HEAD, *later]


def test_nothing_travels_down_without_a_federation() -> None:
    assert [result.bytes_down for result in play(federation("centralized"))] == [0] * 7


def test_a_client_that_missed_a_round_is_sent_both_factors() -> None:
    _, *results = play(federation(rounds=12, participation=0.5))
    last: dict[str, int] = {}
    missed = 0
    for result in results:
        expected = 0
        for client in result.cohort:
            if last.get(client) == result.round - 1:
                expected += HEAD + (B if result.round % 2 == 0 else A)
            else:
                expected += A + B + HEAD
                missed += client in last
            last[client] = result.round
        assert result.bytes_down == expected
    assert missed > 3


def test_a_factor_that_never_changes_travels_to_each_client_once_however_long_it_was_away() -> None:
    _, *results = play(federation("ffa_lora", rounds=12, participation=0.5))
    met: set[str] = set()
    for result in results:
        new = set(result.cohort) - met
        assert result.bytes_down == len(result.cohort) * (B + HEAD) + len(new) * A
        met |= new
    assert met == set(CLIENTS)


@pytest.mark.parametrize(
    ("participation", "method"),
    [*((0.5, name) for name in method_names()), (0.17, "rolora"), (1.0, "rolora")],
)
def test_a_client_is_sent_every_tensor_that_it_does_not_hold_bit_for_bit_and_no_other_but_its_own(
    method: str, participation: float
) -> None:
    def broken(round: int, attempt: int, client: str) -> bool:
        return client == "ann" or (round in (3, 6) and attempt == 0 and client != "bob")

    engine = Pretended(broken)
    few = Aggregation(mean(), quorum=2 if participation > 0.2 else 1)  # bob sends in vain
    run = federation(method, engine=engine, rounds=14, participation=participation, aggregation=few)
    results = play(run)[1:]
    holds: dict[str, AdapterState] = {}
    own: dict[str, set[str]] = {}  # what a client sent last: it need not have been changed by that
    for job, result in zip(engine.jobs, results, strict=True):
        least = most = 0
        for assigned in job.cohort:
            client, view = assigned.info, assigned.received
            has: Mapping[str, Tensor] = holds.get(client.id, {})
            lacks = {n for n in view if n not in has or not torch.equal(has[n], view[n])}
            made = applied(has, job.server.patches)
            factors = {n for n in lacks & made.keys() if torch.equal(made[n], view[n])}
            growth, layers = job.server.patches, set(map(layer_of, factors))
            added = [tensor for name, tensor in growth.items() if layer_of(name) in layers]
            least += view.select((lacks - factors).__contains__).num_bytes()
            least += sum(tensor.nbytes for tensor in added)
            often = (lacks | own.pop(client.id, set())) - factors
            most += view.select(often.__contains__).num_bytes()
            most += sum(tensor.nbytes for tensor in added)
            holds[client.id] = view
        for update in Pretended(broken).run(run.method, job):
            if isinstance(update, Update) and run.method.federated:
                holds[update.client] = holds[update.client] | update.adapter
                own[update.client] = set(update.adapter)
        if run.method.resets_factors or run.method.sparse_upload or run.method.name == "ravan":
            assert least <= result.bytes_down <= most
        else:  # what clients send is what they moved
            assert result.bytes_down == (least if run.method.federated else 0)


def test_a_lone_client_holds_the_average_of_its_own_update() -> None:
    _, *results = play(federation(clients={"ann": 5}, rounds=4))
    assert [result.bytes_down for result in results] == [A + B + HEAD, 0, 0, 0]
    clipped = Aggregation(clip(mean(), norm=1e-3))
    _, *results = play(federation(clients={"ann": 5}, rounds=3, aggregation=clipped))
    assert [result.bytes_down for result in results] == [A + B + HEAD, B + HEAD, A + HEAD]


def test_a_tensor_made_for_one_client_travels_every_time() -> None:
    def cut(server: ServerState, client: ClientInfo) -> AdapterState:
        made = {name: t * len(client.id) for name, t in server.adapter.items()}
        made = {name: t for name, t in made.items() if role_of(name) == "A"}
        return server.adapter | made

    _, *results = play(federation(replace(get_method("ffa_lora"), download=cut), rounds=3))
    each = [result.bytes_down / len(CLIENTS) for result in results]
    assert each == [A + B + HEAD] * 3


def test_a_client_that_has_never_taken_part_costs_the_ledger_nothing() -> None:
    waiting = {f"waiting-{i:04d}": 1 for i in range(1000)}
    *_, few = play(federation(rounds=1))
    *_, many = play(federation(rounds=1, clients=CLIENTS | waiting, participation=0.006))
    assert many.state.ledger.held.keys() == set(many.cohort)
    assert len(many.cohort) == len(few.cohort) == len(CLIENTS)
    assert many.state.ledger.changed == few.state.ledger.changed


def test_a_rejected_update_has_travelled_and_a_failure_has_not() -> None:
    @dataclass(frozen=True)
    class Spoiling(Pretended):
        def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
            for reply in super().run(method, job):
                if reply.client == "ann" and isinstance(reply, Update):
                    yield replace(reply, num_examples=10**9)
                else:
                    yield reply

    engine = Spoiling(broken=lambda round, attempt, client: client == "bob")
    _, result = play(federation(engine=engine, rounds=1))
    assert result.rejected.keys() == {"ann", "bob"}
    assert result.clients.keys() == CLIENTS.keys() - {"ann", "bob"}
    assert result.bytes_up == 5 * (B + HEAD)


# cohorts


@pytest.mark.parametrize(
    ("clients", "participation", "size"),
    [(10, 1.0, 10), (10, 0.25, 3), (10, 0.24, 2), (3, 0.5, 2), (7, 0.01, 1), (1, 0.3, 1)],
)
def test_a_cohort_is_the_nearest_whole_number_of_clients_and_at_least_one(
    clients: int, participation: float, size: int
) -> None:
    ids = [f"client-{i:02d}" for i in range(clients)]
    cohort = sample_cohort(ids, participation, 0, 1, 0)
    assert cohort_size(clients, participation) == size == len(cohort)
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(ids)


def test_a_cohort_depends_on_seed_round_and_attempt_and_not_on_the_order_of_clients() -> None:
    ids = [f"client-{i:02d}" for i in range(30)]
    drawn = {key: sample_cohort(ids, 0.3, *key) for key in itertools.product(range(4), repeat=3)}
    assert len(set(drawn.values())) == len(drawn)
    for key, cohort in drawn.items():
        assert sample_cohort(ids[::-1], 0.3, *key) == cohort


def test_what_clients_are_sent_does_not_say_whom_the_server_will_draw() -> None:
    def played(**seeds: Any) -> tuple[list[tuple[str, ...]], set[int]]:
        run = federation(participation=0.5, **seeds)
        cohorts = [result.cohort for result in play(run)]
        return cohorts, {job.seed for job in run.engine.jobs}  # type: ignore[attr-defined]

    (plain, sent), (same_seed, _), (other, still) = (
        played(),
        played(server_seed=3),
        played(server_seed=4),
    )
    assert plain == same_seed
    assert plain != other
    assert sent == still == {3}


def test_reducers_and_methods_draw_from_the_server_s_seed() -> None:
    def drawn(**seeds: Any) -> AdapterState:
        return play(federation("flora", rounds=1, **seeds))[-1].state.server.adapter.only(
            frozenset({"A"})
        )

    assert drawn() == drawn(server_seed=3) != drawn(server_seed=4)


def test_every_client_is_drawn_equally_often() -> None:
    ids = list("abcdefgh")
    drawn = "".join("".join(sample_cohort(ids, 0.25, 0, round, 0)) for round in range(1, 1001))
    for client in ids:
        assert abs(drawn.count(client) - 250) < 5 * math.sqrt(1000 * 0.25 * 0.75)


@pytest.mark.parametrize("spare", [0, 2])
def test_the_trusted_client_is_in_every_cohort_which_is_no_larger_for_it(spare: int) -> None:
    ids = list("abcdefgh")
    drawn = Counter[str]()
    for round in range(1, 301):
        plain = sample_cohort(ids, 0.5, 0, round, 0, spare)
        cohort = sample_cohort(ids, 0.5, 0, round, 0, spare, trusted="c")
        assert len(cohort) == len(plain) == 4 + spare
        assert list(cohort) == sorted(set(cohort))
        assert set(cohort) <= {*plain, "c"}
        fewer = sample_cohort(ids, 0.5, 0, round, 0, trusted="c")
        assert set(fewer) <= set(cohort)
        drawn.update(cohort)
    assert drawn["c"] == 300
    share = 300 * (3 + spare) / 7
    assert all(abs(drawn[client] - share) < 5 * math.sqrt(75) for client in set(ids) - {"c"})


def test_a_trusted_client_that_is_not_there_ends_the_run_with_its_name() -> None:
    aggregation = Aggregation(mean(), trusted="zoe")
    with pytest.raises(NoQuorum, match="no usable update of zoe, the trusted client: it is not in"):
        play(federation(aggregation=aggregation))
    run = federation(aggregation=Aggregation(mean(), trusted="dee"), participation=0.4)
    assert all("dee" in result.cohort for result in play(run)[1:])


def test_who_pools_all_rows_trusts_nobody_in_particular() -> None:
    run = federation("centralized", aggregation=Aggregation(mean(), trusted="dee"))
    assert play(run)[-1].round == 6


def test_every_method_sees_the_same_cohorts() -> None:
    cohorts = {
        tuple(result.cohort for result in play(federation(name, participation=0.5)))
        for name in method_names()
    }
    assert len(cohorts) == 1
    (one,) = cohorts
    assert one[0] == ()
    assert len(set(one)) > 3


def test_the_engine_is_given_the_cohort_with_the_largest_shard_first() -> None:
    run = federation(participation=0.7)
    results = play(run)
    jobs: list[Job] = run.engine.jobs  # type: ignore[attr-defined]
    for job, result in zip(jobs, results[1:], strict=True):
        ids = sorted(result.cohort, key=lambda id: (-CLIENTS[id], id))
        infos = tuple(ClientInfo(id, CLIENTS[id], 2, result.round) for id in ids)
        assert tuple(assigned.info for assigned in job.cohort) == infos


def test_the_loss_of_a_round_weighs_clients_by_their_rows() -> None:
    first, result, *_ = play(federation())
    assert first.loss is None
    assert result.loss == pytest.approx(
        sum(n * n for n in CLIENTS.values()) / sum(CLIENTS.values())
    )
    assert result.clients["cy"] == {"num_examples": 9, "loss": 9.0}


# quorum


def test_a_round_that_never_finds_a_quorum_is_tried_thrice_and_exits_with_code_4() -> None:
    engine = Pretended(broken=lambda round, attempt, client: round == 2 and client != "ann")
    run = federation(engine=engine, aggregation=Aggregation(mean(), quorum=2))
    results: list[RoundResult] = []
    with pytest.raises(NoQuorum, match="round 2: no quorum of 2 after 3 attempts") as stopped:
        results.extend(federate(run, start()))
    assert stopped.value.exit_code == 4
    done = [(result.round, result.attempt, result.advanced) for result in results]
    assert done == [(0, 0, True), (1, 0, True), (2, 0, False), (2, 1, False), (2, 2, False)]


def test_a_failed_attempt_changes_no_tensor_and_its_retry_is_of_the_same_phase() -> None:
    engine = Pretended(broken=lambda round, attempt, client: round == 2 and attempt < 2)
    run = federation(engine=engine, participation=0.5, rounds=3)
    _, one, failed, again, two, three = play(run)
    for attempt in (failed, again):
        assert not attempt.advanced
        assert same(attempt.state.server.adapter, one.state.server.adapter)
        assert attempt.metrics == {}
        assert attempt.rejected == dict.fromkeys(attempt.cohort, "offline")
    assert [r.round for r in (failed, again, two, three)] == [2, 2, 2, 3]
    assert [r.attempt for r in (failed, again, two, three)] == [0, 1, 2, 0]
    assert [r.factors for r in (failed, again, two)] == [("A", "head")] * 3
    assert three.factors == ("B", "head")
    assert len({r.cohort for r in (failed, again, two)}) > 1  # a retry draws anew


def test_a_run_that_gave_up_tries_again_when_it_is_resumed() -> None:
    down = Pretended(broken=lambda round, attempt, client: round == 2)
    results: list[RoundResult] = []
    with pytest.raises(NoQuorum):
        results.extend(federate(federation(engine=down), start()))
    resumed = play(federation(), results[-1].state)
    assert [result.round for result in resumed] == [2, 3, 4, 5, 6]
    assert resumed[0].attempt == 3  # never a cohort that was asked before
    with pytest.raises(NoQuorum):
        play(federation(engine=down), results[-1].state)


def test_without_a_federation_there_is_no_quorum_to_miss() -> None:
    few = Aggregation(mean(), quorum=3)
    results = play(federation("centralized", aggregation=few))
    assert [(result.round, result.advanced) for result in results] == [(r, True) for r in range(7)]
    assert results[1].cohort == tuple(sorted(CLIENTS))
    assert results[1].clients.keys() == {POOL}


# step sizes


def test_a_constant_rate_is_the_rate_in_every_round() -> None:
    train = TrainConfig(lr=0.3, rounds=7)
    assert {train.rate(round) for round in range(1, 8)} == {0.3}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_a_falling_rate_starts_at_the_rate_and_would_be_0_after_the_last_round(
    schedule: Any, rates: list[float]
) -> None:
    train = TrainConfig(lr=2.0, rounds=4, schedule=schedule)
    found = [train.rate(round) for round in range(1, 6)]
    assert found == pytest.approx([2 * rate for rate in [*rates, 0.0]])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_evenly_and_the_round_after_it_has_the_whole_rate(schedule: Any) -> None:
    train = TrainConfig(lr=1.0, rounds=8, schedule=schedule, warmup_rounds=3)
    found = [train.rate(round) for round in range(1, 9)]
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert sorted(found[3:], reverse=True) == found[3:]
    assert found[-1] > 0
    assert (found[4] < 1) == (schedule != "constant")


def test_each_round_trains_with_the_rate_of_its_number_even_when_it_is_retried() -> None:
    engine = Pretended(broken=lambda round, attempt, client: round == 2 and attempt == 0)
    results = play(federation(engine=engine, rounds=3))
    assert [result.lr for result in results[1:]] == [0.1, 0.05, 0.05, 0.1 / 3]
    assert [job.lr for job in engine.jobs] == [0.1, 0.05, 0.05, 0.1 / 3]


# evaluation, the best round, stopping


@pytest.mark.parametrize(
    ("method", "every", "rounds", "evaluated"),
    [
        ("fedit", 3, 7, [0, 3, 6, 7]),
        ("fedit", 2, 4, [0, 2, 4]),
        ("fedit", 100, 5, [0, 5]),
        ("rolora", 3, 8, [0, 3, 6, 7, 8]),
        ("rolora", 100, 5, [0, 4, 5]),
        ("rolora", 9, 1, [0, 1]),
        (get_method("rolora", b_rounds=3), 100, 6, [0, 4, 6]),
        (get_method("rolora", b_rounds=3), 100, 8, [0, 7, 8]),
    ],
)
def test_round_zero_every_nth_round_and_the_last_of_each_phase_are_evaluated(
    method: str | Method, every: int, rounds: int, evaluated: list[int]
) -> None:
    seen: list[AdapterState] = []

    def measure(adapter: AdapterState) -> dict[str, float]:
        seen.append(adapter)
        return {"accuracy": len(seen)}

    results = play(federation(method, eval_every=every, rounds=rounds, evaluate=measured(measure)))
    assert [result.round for result in results if result.metrics] == evaluated
    states = [result.state.server.adapter for result in results if result.metrics]
    assert all(one is other for one, other in zip(seen, states, strict=True))


VALIDATION = {0: 0.9, 1: 0.3, 2: 0.2, 3: 0.5, 4: 0.5, 5: 0.4, 6: 0.6}


@pytest.mark.parametrize("test_scores", [range(7), range(7, 0, -1)])
def test_stopping_and_the_best_round_go_by_validation_and_never_by_the_test(
    test_scores: range,
) -> None:
    test = scores(dict(enumerate(test_scores)))
    run = federation("fedit", eval_every=1, patience=2, evaluate=measured(test, scores(VALIDATION)))
    results = play(run)
    assert [result.round for result in results] == [0, 1, 2, 3, 4, 5]  # 4 and 5 are no better
    best = results[-1].state.best
    assert best is not None
    assert (best.round, best.value) == (3, 0.5)
    assert same(best.adapter, results[3].state.server.adapter)
    assert not same(best.adapter, results[-1].state.server.adapter)


def test_without_patience_every_round_runs_and_the_best_is_kept_all_the_same() -> None:
    run = federation("fedit", eval_every=1, evaluate=measured(validation=scores(VALIDATION)))
    results = play(run)
    bests = [result.state.best.round if result.state.best else None for result in results]
    assert bests == [None, 1, 1, 3, 3, 3, 6]  # the start, however good, is no round


def test_of_a_metric_where_lower_is_better_the_lowest_is_best() -> None:
    values = {0: 0.1, 1: 0.9, 2: 0.4, 3: 0.6, 4: 0.5, 5: 0.1, 6: 0.1}
    validation = scores(values, "loss")
    run = federation(
        "fedit",
        eval_every=1,
        patience=2,
        metric="loss",
        higher_is_better=False,
        evaluate=measured(validation=validation),
    )
    results = play(run)
    assert results[-1].round == 4
    assert results[-1].state.best is not None
    assert results[-1].state.best.round == 2


def test_the_best_round_of_an_alternating_method_goes_by_the_mean_over_its_phases() -> None:
    swinging = {0: 0.0, 1: 0.3, 2: 0.8, 3: 0.5, 4: 0.9, 5: 0.4, 6: 0.92}
    run = federation(eval_every=1, evaluate=measured(validation=scores(swinging)))
    results = play(run)
    bests = [best for result in results if (best := result.state.best)]
    # B 0.3; A 0.8 and B 0.3; B 0.5 and A 0.8; A 0.9 and B 0.5; then 0.4 and 0.9; 0.92 and 0.4
    wanted = [(1, 0.3), (2, 0.55), (3, 0.65), (4, 0.7), (4, 0.7), (4, 0.7)]
    assert [(best.round, round(best.value, 9)) for best in bests] == wanted
    assert results[3].state.phases == {"B+head": 0.5, "A+head": 0.8}


def test_no_round_is_the_best_by_the_validation_of_one_phase_alone() -> None:
    good_after_a = {0: 0.0, 2: 0.8, 4: 0.8, 6: 0.8, 7: 0.5, 8: 0.82}
    validated = measured(validation=scores(good_after_a))
    results = play(federation(rounds=8, eval_every=2, patience=1, evaluate=validated))
    bests = [
        best and (best.round, round(best.value, 9)) for best in (r.state.best for r in results)
    ]
    assert bests == [None] * 7 + [(7, 0.65), (8, 0.66)]


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_a_validation_that_is_not_finite_is_no_better_than_any_other(worst: float) -> None:
    validated = measured(validation=scores({0: 0.0, 1: worst, 2: 0.4, 3: worst, 4: 0.3}))
    run = federation("fedit", rounds=4, eval_every=1, evaluate=validated)
    best = play(run)[-1].state.best
    assert best is not None
    assert best.round == 2


def test_patience_counts_evaluations_and_not_rounds() -> None:
    values = {0: 0.0, 1: 0.5, 2: 0.4, 3: 0.3}
    validated = measured(validation=scores(values))
    run = federation("fedit", eval_every=3, patience=2, rounds=30, evaluate=validated)
    assert play(run)[-1].round == 9


def test_a_metric_that_validation_does_not_have_is_named_before_any_training() -> None:
    run = federation(
        metric="perplexity", evaluate=measured(validation=lambda _: {"accuracy": 0.5, "loss": 1})
    )
    with pytest.raises(ConfigError, match=r"'perplexity'.*: accuracy, loss"):
        play(run)
    assert run.engine.jobs == []  # type: ignore[attr-defined]


def test_every_client_with_held_out_rows_is_measured_whether_in_the_cohort_or_not() -> None:
    run = federation(
        per_client=True, participation=0.3, eval_every=4, evaluate=measured(lambda _: {"loss": 1.0})
    )
    results = play(run)
    assert [result.round for result in results if result.client_metrics] == [0, 4, 5, 6]
    assert results[4].client_metrics == {
        client: {"accuracy": rows + 0.04} for client, rows in CLIENTS.items() if client != "ann"
    }
    assert results[4].metrics == {"loss": 1.0}  # one adapter for all: the server's test


def test_clients_are_not_measured_unless_that_is_asked_for() -> None:
    assert not any(result.client_metrics for result in play(federation(eval_every=1)))


def test_where_adapters_are_personal_the_test_metric_is_the_mean_over_clients() -> None:
    results = play(
        federation("local", eval_every=3, evaluate=measured(lambda _: {"accuracy": -1.0}))
    )
    assert results[0].metrics == {"accuracy": -1.0}  # nobody has trained yet
    mean_rows = sum(CLIENTS.values()) / len(CLIENTS)
    assert results[3].metrics["accuracy"] == pytest.approx(mean_rows + 0.03)
    assert results[3].client_metrics.keys() == CLIENTS.keys() - {"ann"}


# going on


def drift(adapter: AdapterState) -> dict[str, float]:
    """A measure that depends on every tensor and on nothing else."""
    return {"accuracy": sum(float(tensor.abs().sum()) for tensor in adapter.values()) % 1}


@pytest.mark.parametrize("name", method_names())
def test_going_on_from_any_result_gives_what_never_stopping_gives(name: str) -> None:
    def run() -> Federation:
        shaky = Pretended(broken=lambda r, attempt, client: r in (1, 3) and attempt < 2)
        changes = {"evaluate": measured(drift, drift), "patience": 4, "eval_every": 1}
        return federation(name, engine=shaky, participation=0.5, rounds=7, **changes)

    whole = play(run())
    assert len(whole) > 5
    for index, result in enumerate(whole):
        # the state of round 0 is the start itself, so round 0 is evaluated, and yielded, again
        rest = play(run(), result.state)[1 if index == 0 else 0 :]
        assert len(rest) == len(whole) - index - 1
        for one, other in zip(rest, whole[index + 1 :], strict=True):
            assert {**line(one), "seconds": 0} == {**line(other), "seconds": 0}
            assert one.advanced == other.advanced
            assert same(one.state.server.adapter, other.state.server.adapter)
            assert one.state.ledger == other.state.ledger
            assert one.state.stale == other.state.stale
            assert (one.state.best and one.state.best.round) == (
                other.state.best and other.state.best.round
            )


def test_a_finished_run_has_nothing_left_to_do() -> None:
    assert play(federation(), play(federation())[-1].state) == []


def test_a_round_s_server_state_is_the_weighted_mean_of_what_its_clients_sent() -> None:
    run = federation(rounds=1)
    _, result = play(run)
    (job,) = run.engine.jobs  # type: ignore[attr-defined]
    roles: Roles = frozenset({"B", "head"})
    total = sum(CLIENTS.values())
    expected = {name: 0 * tensor.double() for name, tensor in start().server.adapter.items()}
    for client in (assigned.info for assigned in job.cohort):
        seed = derived_seed(job.seed, 1, client.id)
        held = moved(start().server.adapter, roles, seed)
        for name, tensor in held.items():
            expected[name] += client.num_examples / total * tensor.double()
    assert relative(result.state.server.adapter, expected) < 1e-7
