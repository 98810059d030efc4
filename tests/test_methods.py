"""What every file in ``rolora/methods`` must hold, and what each method is.

The common part runs over ``method_names()``. A new method needs its file and a row in
``tests/methods.toml``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from itertools import permutations
from pathlib import Path

import pytest
import torch
from states import Cohort, assign, dense, effect, make_specs, relative, same, start_of, updates_from
from tiny import tiny_bert
from tiny_clients import SHARDS, Bench, classifier

from rolora.algorithm.adapter import AdapterState, ClientInfo, Roles, Update, role_of
from rolora.algorithm.choices import Format
from rolora.algorithm.codec import num_bytes
from rolora.algorithm.method import Method, Reduce, ServerState, freeze_head
from rolora.algorithm.reduce import mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.errors import ConfigError
from rolora.methods import METHODS, get_method, method_names
from rolora.plan.method_table import describe_methods
from rolora.training.client_store import ClientStore
from rolora.training.engine import InProcess, Job
from rolora.training.rounds import Federation, RoundResult, RunState, federate
from rolora.training.settings import LocalSettings

SIZES = {"ann": 10, "bob": 7, "cy": 3, "dee": 5}
MEAN = Aggregation(mean())
ROUNDS = range(1, 9)
HEAD: Roles = frozenset({"head"})
every_method = pytest.mark.parametrize(
    "method", [get_method(name) for name in method_names()], ids=method_names()
)
head_or_not = pytest.mark.parametrize(
    "how", [lambda method: method, freeze_head], ids=["head", "frozen"]
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return classifier(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def bench32(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return classifier(tiny_bert(tmp_path_factory.mktemp("bert32")), torch.float32)


def dense_gradient() -> dict[str, torch.Tensor]:
    """A gradient for each layer, for methods that start from one."""
    drawn = dense(start_of(get_method("fedit"), make_specs(), 0))
    return {layer: matrix.float() for layer, matrix in drawn.items()}


def server_at(method: Method, round: int, dtype: torch.dtype = torch.float64) -> ServerState:
    """A server that is about to run this round; no tensor of the method's is 0."""
    return ServerState(start_of(method, make_specs(), round, dtype), round=round - 1)


def cohort_at(method: Method, server: ServerState) -> Cohort:
    drawn = tuple(ClientInfo(id, count, 2, server.round + 1) for id, count in SIZES.items())
    return assign(method, server, method.cohort(drawn, sum(SIZES.values())))


def updates_at(method: Method, server: ServerState) -> list[Update]:
    return updates_from(method, cohort_at(method, server))


def after(method: Method, server: ServerState, updates: list[Update], seed: int = 0) -> ServerState:
    cohort = {u.client: cohort_at(method, server)[u.client] for u in updates}
    return step(method, MEAN, server, cohort, updates, generator(seed, "aggregate"))[0]


# every method


@every_method
def test_a_method_is_named_after_its_file(method: Method) -> None:
    assert method.name in method_names()
    assert METHODS.factory(method.name).__module__ == f"rolora.methods.{method.name}"


@every_method
def test_a_method_file_cites_its_source_by_arxiv_number(method: Method) -> None:
    text = importlib.import_module(f"rolora.methods.{method.name}").__doc__ or ""
    (row,) = (row for row in describe_methods() if row.name == method.name)
    number = row.paper.removeprefix("arXiv:")
    assert len(number.replace(".", "")) == 9
    assert number in text


@every_method
def test_every_option_of_a_method_is_a_keyword_with_a_default(method: Method) -> None:
    for option in inspect.signature(METHODS.factory(method.name)).parameters.values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty


@every_method
@head_or_not
def test_only_what_is_trained_travels_and_personal_is_exactly_the_rest(
    method: Method, how: Callable[[Method], Method]
) -> None:
    method = how(method)
    for round in ROUNDS:
        trains = method.trained(round)
        assert method.shared(round) <= trains <= {"A", "B", "core", "head"}
        assert trains == frozenset().union(*(method.trainable(round, step) for step in range(9)))
        assert method.personal(round) | method.shared(round) == trains
        assert not method.personal(round) & method.shared(round)


@every_method
def test_what_starts_at_zero_is_trained_within_two_rounds(method: Method) -> None:
    names = start_of(method, make_specs(), 0)
    born = "core" if any(role_of(name) == "core" for name in names) else "B"
    for round in ROUNDS:
        assert {born, "head"} <= method.trained(round) | method.trained(round + 1)


@every_method
@head_or_not
@pytest.mark.parametrize("round", [1, 2])
def test_local_training_changes_every_tensor_it_declares_and_no_bit_of_another(
    bench: Bench,
    tmp_path: Path,
    method: Method,
    how: Callable[[Method], Method],
    round: int,
) -> None:
    method = how(method)
    engine = InProcess(
        bench.base,
        bench.task,
        bench.examples,
        SHARDS,
        LocalSettings(steps=2, batch_size=4),
        ClientStore(tmp_path),
    )
    server = ServerState(bench.start_of(method), round=round - 1)
    drawn = tuple(ClientInfo(id, len(rows), 2, round) for id, rows in SHARDS.items())
    cohort = tuple(assign(method, server, method.cohort(drawn, 23)).values())
    job = Job(server, cohort, 0, 5e-3)
    work = engine.prepare(cohort[0])
    (result,) = engine.train(method, job, [work])
    changed = {n for n, t in result.adapter.items() if not torch.equal(t, server.adapter[n])}
    assert changed == set(server.adapter.only(method.trained(round)))
    assert changed


# an encoding depends on what a method sends, not on how it aggregates: one method of each kind
@pytest.mark.parametrize(
    ("name", "up"),
    [
        *(("rolora", up) for up in ("bf16", "int8", "int4")),
        *((name, "int8") for name in ("lora_a2", "fedsa_lora", "flora", "ravan", "centralized")),
        ("lora_a2", "int4"),
    ],
)
def test_three_rounds_of_encoded_uploads_cost_their_bytes_and_stay_near_those_in_fp32(
    bench32: Bench, tmp_path: Path, name: str, up: Format
) -> None:
    method = get_method(name)

    def play(how: Format) -> list[RoundResult]:
        engine = InProcess(
            bench32.base,
            bench32.task,
            bench32.examples,
            SHARDS,
            LocalSettings(steps=2, batch_size=4),
            ClientStore(tmp_path / how),
            up=how,
        )
        run = Federation(
            method=method,
            engine=engine,
            aggregation=MEAN,
            ranks=lambda clients: dict.fromkeys(clients, 2),
            seed=0,
            rounds=3,
            lr=lambda round: 5e-3,
        )
        return list(federate(run, RunState(ServerState(start))))[1:]

    start = bench32.start_of(method)
    plain, encoded = play("fp32"), play(up)
    for result in encoded:
        shared = start.only(method.shared(result.round))
        each = num_bytes(up, shared) if method.federated else 0
        assert result.rejected == {}
        if method.sparse_upload:
            assert 0 < result.bytes_up < 0.8 * len(SHARDS) * each
        else:
            assert result.bytes_up == len(SHARDS) * each
        assert result.bytes_down == plain[result.round - 1].bytes_down
        if method.exact and not method.personal(result.round):
            assert result.aggregation_error is not None
            assert result.aggregation_error <= 1e-6
    ended, wanted = encoded[-1].state.server.adapter, plain[-1].state.server.adapter
    if not method.federated or not method.shared(1):
        assert same(ended, wanted)
    else:
        missed, moved = (
            relative(effect(ended), effect(wanted)),
            relative(effect(start), effect(wanted)),
        )
        assert 0 < missed <= {"bf16": 0.03, "int8": 0.05, "int4": 0.3}[up] * moved


@every_method
def test_a_client_is_handed_every_tensor_of_the_adapter(method: Method) -> None:
    for round in ROUNDS:
        server = server_at(method, round)
        for one in cohort_at(method, server).values():
            assert {spec.name for spec in make_specs().tensors} <= one.received.keys()
            assert same(one.received, server.adapter)


@every_method
def test_a_client_of_a_smaller_rank_is_handed_its_first_directions_where_a_method_has_such(
    method: Method,
) -> None:
    server = server_at(method, 1)
    view = method.download(server, ClientInfo("ann", 10, 1, 1))
    if (
        not method.heterogeneous_ranks or method.sparse_upload
    ):  # a sparse method's clients hold all and send less
        assert same(view, server.adapter)
        return
    for layer in view.layers():
        down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        assert torch.equal(view[down], server.adapter[down][:1])
        assert torch.equal(view[up], server.adapter[up][:, :1])
    rest = view.select(lambda name: role_of(name) not in ("A", "B"))
    assert same(rest, server.adapter.select(rest.__contains__))


@every_method
def test_the_start_has_every_tensor_a_product_of_zero_and_hangs_on_its_seed_alone(
    method: Method,
) -> None:
    specs = make_specs()
    specs = replace(specs, gradient=dense_gradient())
    first, again, other = (method.init(specs, generator(seed)) for seed in (0, 0, 1))
    shapes = {name: tensor.shape for name, tensor in first.items()}
    assert {spec.name: spec.shape for spec in specs.tensors}.items() <= shapes.items()
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert first.delta().keys() == specs.scaling.keys()
    assert not any(matrix.any() for matrix in dense(first).values())
    assert same(first, again)
    assert not same(first, other)


@every_method
def test_a_round_of_clients_that_agree_ends_where_they_are(method: Method) -> None:
    for round in (1, 2):
        server = server_at(method, round)
        (one, *_) = updates_at(method, server)
        infos = [other.info for other in cohort_at(method, server).values()]
        agreed = [replace(one, client=c.id, num_examples=c.num_examples) for c in infos]
        ended, there = after(method, server, agreed).adapter, server.adapter | one.adapter
        assert relative(effect(ended), effect(there)) <= 1e-14
        if not method.resets_factors:
            assert relative(ended, there) <= 1e-14


@every_method
def test_a_single_client_s_round_ends_with_exactly_what_it_sent(method: Method) -> None:
    for round in (1, 2):
        server = server_at(method, round, torch.float32)
        (one, *_) = updates_at(method, server)
        ended, there = after(method, server, [one]).adapter, server.adapter | one.adapter
        if method.resets_factors:  # another pair of factors of the same product
            assert relative(effect(ended), effect(there)) <= 1e-6
        else:
            assert same(ended, there)


@every_method
def test_what_is_neither_shared_nor_made_by_the_server_stays_there_bit_for_bit(
    method: Method,
) -> None:
    for round in (1, 2):
        server = server_at(method, round)
        ended = after(method, server, updates_at(method, server))
        moved = {n for n in server.adapter if not torch.equal(ended.adapter[n], server.adapter[n])}
        made = {"A", "B", "delta"} if method.resets_factors else {"delta"}
        roles = {role_of(name) for name in moved}
        assert method.shared(round) <= roles <= method.shared(round) | made


@every_method
def test_neither_order_of_arrival_nor_the_names_of_clients_matter(method: Method) -> None:
    server = server_at(method, 1)
    updates = updates_at(method, server)
    first = after(method, server, updates).adapter
    cohort = cohort_at(method, server)
    for order in permutations(updates):
        arrived, _ = step(method, MEAN, server, cohort, order, generator(0, "aggregate"))
        assert same(arrived.adapter, first)
        permuted = after(method, server, list(order)).adapter  # another order of the cohort
        assert relative(effect(permuted), effect(first)) <= 1e-14


@every_method
def test_the_same_updates_and_generator_give_the_same_state(method: Method) -> None:
    server = server_at(method, 2)
    updates = updates_at(method, server)
    first, again = (after(method, server, updates) for _ in range(2))
    assert same(first.adapter, again.adapter)
    assert (first.round, first.attempt, first.memory) == (again.round, again.attempt, again.memory)


@every_method
def test_a_round_reduces_once_and_leaves_the_state_it_was_given_as_it_was(method: Method) -> None:
    server = server_at(method, 1)
    before = {name: tensor.clone() for name, tensor in server.adapter.items()}
    calls = []

    def counted(state: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        @wraps(reduce)
        def once(*args: object, **named: object) -> object:
            calls.append(1)
            return reduce(*args, **named)  # type: ignore[arg-type]

        return method.aggregate(state, once, rng)  # type: ignore[arg-type]

    after(replace(method, aggregate=counted), server, updates_at(method, server))
    assert len(calls) == 1
    assert same(server.adapter, before)


@every_method
def test_a_frozen_head_is_neither_trained_nor_sent_and_nothing_else_changes(method: Method) -> None:
    frozen = freeze_head(method)
    for round in ROUNDS:
        assert frozen.trained(round) == method.trained(round) - HEAD
        assert frozen.shared(round) == method.shared(round) - HEAD
        server = server_at(frozen, round)
        updates = updates_at(frozen, server)
        for update in updates:
            assert "head" not in set(map(role_of, update.adapter))
        ended = after(frozen, server, updates).adapter
        assert same(ended.only(HEAD), server.adapter.only(HEAD))


# the methods by name


def moving(method: Method) -> list[Roles]:
    """Trained = sent, round by round."""
    found = [method.trained(round) for round in ROUNDS]
    assert found == [method.shared(round) for round in ROUNDS]
    return found


def test_rolora_trains_and_sends_b_in_odd_rounds_and_a_in_even_ones() -> None:
    assert moving(get_method("rolora")) == [{"B", "head"}, {"A", "head"}] * 4


def test_first_a_swaps_the_rounds_of_rolora() -> None:
    assert moving(get_method("rolora", first="A")) == [{"A", "head"}, {"B", "head"}] * 4


@pytest.mark.parametrize("round", [1, 2])
def test_a_retried_attempt_stays_in_the_phase_of_its_round(round: int) -> None:
    method = get_method("rolora")
    server = server_at(method, round)
    few = Aggregation(mean(), quorum=4)
    for attempt in (1, 2, 3):
        one = updates_at(method, server)[:1]
        server, _ = step(method, few, server, cohort_at(method, server), one, generator(0))
        assert (server.round + 1, server.attempt) == (round, attempt)
        expected = {"B" if round == 1 else "A", "head"}
        assert {role_of(n) for u in updates_at(method, server) for n in u.adapter} == expected


def test_fedsvd_never_leaves_the_directions_that_ffa_lora_reads() -> None:
    def reads(adapter: AdapterState) -> dict[str, torch.Tensor]:
        """The projection onto the row space of each lora_A."""
        factors = adapter.only(frozenset({"A"}))
        return {name: torch.linalg.pinv(lora_a) @ lora_a for name, lora_a in factors.items()}

    method = get_method("fedsvd")
    server = server_at(method, 1)
    first = server.adapter
    for _ in range(4):
        server = after(method, server, updates_at(method, server))
        assert relative(reads(server.adapter), reads(first)) <= 1e-12
    assert relative(server.adapter.only(frozenset({"A"})), first.only(frozenset({"A"}))) > 0.1


def test_ffa_lora_never_trains_sends_or_changes_a() -> None:
    method = get_method("ffa_lora")
    server = server_at(method, 1)
    start = server.adapter.only(frozenset({"A"}))
    assert moving(method) == [{"B", "head"}] * 8
    for _ in range(4):
        server = after(method, server, updates_at(method, server))
        assert same(server.adapter.only(frozenset({"A"})), start)


def test_fedmomentum_keeps_what_flexlora_drops_unless_its_energy_is_too_low() -> None:
    specs = make_specs(((8, 8, 2),))
    start = start_of(get_method("fedit"), specs, 1, torch.float64)

    def play(method: Method) -> dict[str, torch.Tensor]:
        server = ServerState(method.init(specs, generator(0)) | start)
        cohort = cohort_at(method, server)
        updates = updates_from(method, cohort, size=0.3)
        return dense(step(method, MEAN, server, cohort, updates, generator(0))[0].adapter)

    flexlora = play(get_method("flexlora"))
    assert relative(play(get_method("fedmomentum", energy=0.99)), flexlora) == 0
    assert relative(play(get_method("fedmomentum")), flexlora) > 0.01


def test_fedask_finds_flexlora_s_product_where_the_sketch_holds_the_mean_product() -> None:
    specs = make_specs(((12, 10, 2),))
    start = start_of(get_method("fedit"), specs, 1, torch.float64)

    def play(method: Method) -> tuple[dict[str, torch.Tensor], float]:
        server = ServerState(start)
        cohort = cohort_at(method, server)  # of four clients, so the mean product has rank 8
        ended, report = step(
            method, MEAN, server, cohort, updates_from(method, cohort, size=0.3), generator(0)
        )
        assert report.aggregation_error is not None
        return dense(ended.adapter), report.aggregation_error

    wanted, least = play(get_method("flexlora"))
    for oversampling in (6, 7, 40):
        found, error = play(get_method("fedask", oversampling=oversampling))
        assert relative(found, wanted) <= 1e-12
        assert error == pytest.approx(least, rel=1e-9)
    for oversampling in (0, 2):
        found, error = play(get_method("fedask", oversampling=oversampling))
        assert relative(found, wanted) > 1e-3
        assert error > 1.0001 * least


def test_raflora_with_one_rank_is_flexlora_to_the_bit() -> None:
    one, other = (get_method(name) for name in ("raflora", "flexlora"))
    server = server_at(one, 2, torch.float32)
    updates = updates_at(one, server)
    assert same(after(one, server, updates).adapter, after(other, server, updates).adapter)


@pytest.mark.parametrize(("name", "left"), [("raflora", 1.0), ("flexlora", 0.1)])
def test_what_one_client_in_ten_has_the_rank_for_is_kept_by_raflora_alone(
    name: str, left: float
) -> None:
    method, specs = get_method(name), make_specs(((4, 6, 2),), {})
    (layer,) = specs.scaling
    eye = torch.eye(6, dtype=torch.float64)
    orthogonal = {f"{layer}.lora_A.weight": eye[:2], f"{layer}.lora_B.weight": eye[:4, :2].clone()}
    server = ServerState(start_of(method, specs, 0, torch.float64) | orthogonal)
    infos = [ClientInfo(f"client-{n}", 5, 2 if n == 0 else 1, 1) for n in range(10)]
    cohort = assign(method, server, infos)
    updates = updates_from(method, cohort, size=0.0)
    ended = step(method, MEAN, server, cohort, updates, generator(0))[0].adapter
    found = torch.linalg.svdvals(dense(ended)[layer]) / specs.scaling[layer]
    torch.testing.assert_close(found[:2], torch.tensor([1.0, left]).double())


def test_a_piece_whose_only_client_fails_counts_as_zero_in_raflora() -> None:
    method = get_method("raflora")
    server = server_at(method, 2)
    cohort = assign(method, server, [ClientInfo("ann", 5, 2, 2), ClientInfo("bob", 5, 1, 2)])
    _, bob = updates_from(method, cohort)
    ended, report = step(method, MEAN, server, cohort, [bob], generator(0))
    assert report.accepted == ("bob",)
    sent_alone = cohort["bob"].received | bob.adapter
    assert relative(dense(ended.adapter), dense(sent_alone)) <= 1e-14


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("fault", ["a product of zero", "clients of rank 1"])
@every_method
def test_no_direction_of_a_layer_dies_in_a_round_that_leaves_it_empty(
    method: Method, fault: str, round: int
) -> None:
    rank = 1 if fault == "clients of rank 1" and method.heterogeneous_ranks else 2
    start = method.init(replace(make_specs(), gradient=dense_gradient()), generator(0))
    server = ServerState(start, round=round - 1)
    infos = [ClientInfo(id, count, rank, round) for id, count in SIZES.items()]
    cohort = assign(method, server, method.cohort(tuple(infos), sum(SIZES.values())))
    size = 0.0 if rank == 2 else 0.1
    updates = updates_from(method, cohort, size=size)
    ended = step(method, MEAN, server, cohort, updates, generator(0))[0].adapter
    for layer in ended.layers():
        down, up = ended[f"{layer}.lora_A.weight"], ended[f"{layer}.lora_B.weight"]
        alive = (down != 0).any(dim=1) | (up != 0).any(dim=0)
        assert alive.all(), layer


@pytest.mark.parametrize(
    "name", ["fedask", "flexlora", "fedmomentum", "fedsvd", "flora", "hetlora", "raflora"]
)
def test_a_layer_that_stood_still_in_a_round_trains_in_the_next(
    bench32: Bench, tmp_path: Path, name: str
) -> None:
    method, settings = freeze_head(get_method(name)), LocalSettings(steps=2, batch_size=4)
    parts = bench32.base, bench32.task, bench32.examples, SHARDS, settings, ClientStore(tmp_path)
    run = Federation(
        method=method,
        engine=InProcess(*parts),
        rounds=2,
        lr=lambda round: 5e-3 * (round - 1),
    )
    start = ServerState(method.init(bench32.base.specs, generator(0)))
    _, still, trains = federate(run, RunState(start))
    assert (still.moved, trains.moved) == (False, True)


def test_fedit_trains_and_sends_both_factors_every_round() -> None:
    assert moving(get_method("fedit")) == [{"A", "B", "head"}] * 8


def test_local_trains_everything_and_sends_nothing() -> None:
    method = get_method("local")
    for round in ROUNDS:
        assert method.personal(round) == method.trained(round) == {"A", "B", "head"}
        sent_up = updates_at(method, server_at(method, round))
        assert [len(update.adapter) for update in sent_up] == [0] * 4


def test_centralized_alone_is_no_federation_and_trains_everything() -> None:
    assert [name for name in method_names() if not get_method(name).federated] == ["centralized"]
    assert moving(get_method("centralized")) == [{"A", "B", "head"}] * 8


@every_method
def test_a_trained_head_travels_every_round_or_is_personal(method: Method) -> None:
    head = {spec.name for spec in make_specs().tensors if spec.role == "head"}
    for round in ROUNDS:
        updates = updates_at(method, server_at(method, round))
        if "head" in method.personal(round):
            assert not any(head & update.adapter.keys() for update in updates)
        else:
            assert all(head <= update.adapter.keys() for update in updates)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rolorra", r"unknown method 'rolorra': did you mean 'rolora'\?"),
        ("ffa-lora", r"unknown method 'ffa-lora': did you mean 'ffa_lora'\?"),
        ("zzz", f"unknown method 'zzz': known: {', '.join(method_names())}"),
        ("__init__", "unknown method '__init__'"),
    ],
)
def test_an_unknown_method_names_the_nearest_or_all(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_method(name)


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("rolora", "frist", r"method 'rolora' has no option 'frist': did you mean 'first'\?"),
        ("rolora", "zzz", "no option 'zzz': known: b_rounds, first, orthogonal_a"),
        ("flora", "first", "method 'flora' has no option 'first': it has no options"),
    ],
)
def test_an_unknown_option_names_the_known_ones(name: str, option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_method(name, **{option: "A"})
