"""Claims about FedAvgM, FedAdam and FedExP, against plain torch and the papers' own lines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from method_rows import ROWS
from safetensors.torch import load_file
from states import cohort_of, make_specs, random_state, relative, same, updates_from
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Update, role_of
from rolora.algorithm.method import ServerState
from rolora.algorithm.reduce import (
    Memory,
    Reducer,
    Value,
    clip,
    compose,
    fedadam,
    fedavgm,
    fedexp,
    mean,
    median,
)
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.comparison import grid
from rolora.config.load import load_config, make_config
from rolora.errors import ConfigError
from rolora.methods import get_method, method_names
from rolora.run import runs
from rolora.run.experiment import Experiment

pytestmark = pytest.mark.usefixtures("quick")

SIZES = {"ann": 10, "bob": 7, "cy": 3}
LEAST = {"model": {"path": "m"}, "data": {"train": "t.csv"}}
AVERAGED = [name for name, row in ROWS.items() if row.averaged]
OPTIMIZERS: dict[str, Callable[[Reducer], Reducer]] = {"fedavgm": fedavgm, "fedadam": fedadam}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def play(reducer: Reducer, rounds: int, method: str = "rolora") -> list[ServerState]:
    """The server's states through some rounds of pretended training, in float64."""
    chosen = get_method(method)
    states = [ServerState(random_state(make_specs(), 1, torch.float64))]
    for round in range(1, rounds + 1):
        updates = updates_of(states[-1], method)
        cohort = cohort_of(chosen, states[-1], SIZES)
        rng = generator(0, "aggregate", round)
        after, report = step(chosen, Aggregation(reducer), states[-1], cohort, updates, rng)
        assert report.accepted == tuple(SIZES)
        states.append(after)
    return states


def updates_of(server: ServerState, method: str = "rolora") -> list[Update]:
    """What three clients send that move from where the server is; no two rounds are alike."""
    chosen = get_method(method)
    return updates_from(chosen, cohort_of(chosen, server, SIZES), 100 * (server.round + 1))


def pseudo_gradients(server: ServerState, method: str) -> dict[str, Tensor]:
    """name -> the weighted mean of the clients' moves; only of what they sent."""
    updates = updates_of(server, method)
    total = sum(SIZES.values())
    return {
        name: sum(  # type: ignore[misc]
            SIZES[one.client] / total * (one.adapter[name] - server.adapter[name])
            for one in updates
        )
        for name in updates[0].adapter
    }


@pytest.mark.parametrize("method", ["rolora", "fedit"])
@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.9), (0.3, 0.5), (2.0, 0.0)])
def test_fedavgm_is_torch_s_momentum_on_the_mean_move_of_what_was_sent(
    method: str, lr: float, momentum: float
) -> None:
    states = play(fedavgm(mean(), lr=lr, momentum=momentum), 9, method)
    leaves = {name: torch.nn.Parameter(t.clone()) for name, t in states[0].adapter.items()}
    sgd = torch.optim.SGD(leaves.values(), lr=lr, momentum=momentum)
    for before, after in pairwise(states):
        sgd.zero_grad()
        for name, move in pseudo_gradients(before, method).items():
            leaves[name].grad = -move
        sgd.step()
        assert relative(after.adapter, {n: p.detach() for n, p in leaves.items()}) <= 1e-12


@pytest.mark.parametrize("method", ["rolora", "fedit"])
@pytest.mark.parametrize(
    ("lr", "beta1", "beta2", "tau"), [(0.01, 0.9, 0.99, 1e-3), (0.1, 0.5, 0.9, 1e-5), (1, 0, 0, 1)]
)
def test_fedadam_is_the_paper_s_algorithm_2_for_each_tensor_that_was_sent(
    method: str, lr: float, beta1: float, beta2: float, tau: float
) -> None:
    states = play(fedadam(mean(), lr=lr, beta1=beta1, beta2=beta2, tau=tau), 9, method)
    x = dict(states[0].adapter)
    m = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    v = {name: torch.full_like(tensor, tau * tau) for name, tensor in x.items()}
    for before, after in pairwise(states):
        for name, delta in pseudo_gradients(before, method).items():
            m[name] = beta1 * m[name] + (1 - beta1) * delta
            v[name] = beta2 * v[name] + (1 - beta2) * delta**2
            x[name] = x[name] + lr * m[name] / (v[name] ** 0.5 + tau)
        assert relative(after.adapter, x) <= 1e-12


@pytest.mark.parametrize("method", ["rolora", "fedit"])
@pytest.mark.parametrize("epsilon", [1e-3, 30.0])
def test_fedexp_is_equation_6_of_the_paper_over_all_tensors_that_were_sent(
    method: str, epsilon: float
) -> None:
    lengths = []
    for before, after in pairwise(play(fedexp(epsilon=epsilon), 5, method)):
        delta, sent = pseudo_gradients(before, method), updates_of(before, method)
        flat = torch.cat([tensor.flatten() for tensor in delta.values()])
        square = sum(
            SIZES[one.client] / sum(SIZES.values())
            * torch.cat([(one.adapter[n] - before.adapter[n]).flatten() for n in delta]).norm() ** 2
            for one in sent
        )  # fmt: skip
        lengths.append(max(1.0, float(square / (2 * (flat.norm() ** 2 + epsilon)))))
        x = {n: before.adapter[n] + lengths[-1] * move for n, move in delta.items()}
        assert relative(after.adapter, dict(before.adapter) | x) <= 1e-12
        assert not after.memory
    assert (max(lengths) > 1) == (epsilon < 1), "both branches are seen"


@each_optimizer
def test_what_is_remembered_of_a_waits_bit_for_bit_while_b_moves(name: str) -> None:
    states = play(OPTIMIZERS[name](mean()), 6)
    for before, after in list(pairwise(states))[2:]:
        turn = "B" if after.round % 2 else "A"
        assert after.memory.keys() == before.memory.keys()
        moved = {k for k in after.memory if not torch.equal(after.memory[k], before.memory[k])}
        assert {role_of(key) for key in moved} == {turn, "head"}
        still = {role_of(key) for key in after.memory.keys() - moved}
        assert still == {"A", "B"} - {turn}


@each_optimizer
def test_nothing_is_remembered_of_a_tensor_before_it_has_moved(name: str) -> None:
    kinds = {"fedavgm": {"momentum"}, "fedadam": {"momentum", "square"}}[name]
    start, first, second = play(OPTIMIZERS[name](mean()), 2)
    assert not start.memory
    for state, roles in ((first, {"B", "head"}), (second, {"A", "B", "head"})):
        wanted = {f"{k}/{n}" for k in kinds for n in state.adapter if role_of(n) in roles}
        assert state.memory.keys() == wanted


@pytest.mark.parametrize("inner", [mean, median, lambda: clip(mean(), norm=0.2)])
def test_without_momentum_at_lr_1_fedavgm_is_what_it_wraps(inner: Callable[[], Reducer]) -> None:
    plain, wrapped = play(inner(), 4), play(fedavgm(inner(), lr=1.0, momentum=0.0), 4)
    assert relative(wrapped[-1].adapter, plain[-1].adapter) <= 1e-15


def test_without_momentum_at_lr_1_float32_values_come_out_bit_for_bit() -> None:
    start, *given = (random_state(make_specs(), seed) for seed in range(4))
    wrapped, plain = fedavgm(mean(), lr=1.0, momentum=0.0), mean()
    results = []
    for reducer in (wrapped, plain):
        memory = reducer.init()
        for value in given:
            memory = reducer.add(memory, value, start, 1.0)
        results.append(reducer.finish(memory, generator(0))[0])
    assert same(*results)


@each_optimizer
def test_a_server_optimizer_sees_clipped_moves_where_a_clip_is_given(name: str) -> None:
    norm, optimizer = 0.05, OPTIMIZERS[name]
    states = play(optimizer(clip(mean(), norm=norm)), 1)
    server, updates = states[0], updates_of(states[0])
    small = []
    for one in updates:
        moves = {n: t - server.adapter[n] for n, t in one.adapter.items()}
        size = float(torch.cat([move.flatten() for move in moves.values()]).norm())
        assert size > norm
        clipped = {n: server.adapter[n] + move * norm / size for n, move in moves.items()}
        small.append(replace(one, adapter=AdapterState(clipped, {})))
    how = Aggregation(optimizer(mean()))
    method = get_method("rolora")
    cohort = cohort_of(method, server, SIZES)
    after, _ = step(method, how, server, cohort, small, generator(0))
    assert relative(states[1].adapter, after.adapter) <= 1e-12
    assert relative(play(optimizer(mean()), 1)[1].adapter, after.adapter) > 1e-3


@each_optimizer
def test_an_attempt_without_a_quorum_leaves_the_memory_as_it_was(name: str) -> None:
    server = play(OPTIMIZERS[name](mean()), 3)[-1]
    how = Aggregation(OPTIMIZERS[name](mean()), quorum=3)
    method = get_method("rolora")
    few, cohort = updates_of(server)[:2], cohort_of(method, server, SIZES)
    stalled, report = step(method, how, server, cohort, few, generator(0))
    assert not report.quorum_met
    assert same(stalled.memory, server.memory)


def test_what_the_wrapped_reducer_remembers_is_kept_beside_it() -> None:
    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        return {"a": memory["value"]}, {"calls": memory["calls"] + 1}

    counting = Reducer(
        init=lambda: {"calls": torch.zeros(())},
        add=lambda memory, value, reference, weight: {**memory, "value": value["a"]},
        finish=finish,
    )
    reducer = fedavgm(counting)
    memory = reducer.init()
    for calls in (1, 2, 3):
        memory = reducer.add(memory, {"a": torch.ones(2)}, {"a": torch.zeros(2)}, 1.0)
        _, memory = reducer.finish(memory, generator(0))
        assert memory.keys() == {"inner/calls", "momentum/a"}
        assert float(memory["inner/calls"]) == calls


def test_an_optimizer_over_another_keeps_its_memory_apart() -> None:
    def steps(reducer: Reducer) -> list[float]:
        memory, found = reducer.init(), []
        for _ in range(4):
            memory = reducer.add(memory, {"a": torch.ones(1)}, {"a": torch.zeros(1)}, 1.0)
            value, memory = reducer.finish(memory, generator(0))
            found.append(float(value["a"]))
        return found

    expected, momentum = [], 0.0
    for one in steps(fedadam(mean())):
        momentum = 0.9 * momentum + one
        expected.append(momentum)
    assert steps(fedavgm(fedadam(mean()))) == pytest.approx(expected)


def adapter_hash(path: Path) -> str:
    return hashlib.sha256((path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@each_optimizer
def test_a_run_with_a_server_optimizer_resumes_to_the_same_bytes(
    site: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(site, [f"aggregate.optimizer={name}"])
    list(runs.start(config, tmp_path / "whole").rounds())
    list(runs.start(load_config(site), tmp_path / "plain").rounds())
    for rounds in (1, 2, 3):
        path = tmp_path / f"stopped-{rounds}"
        list(islice(runs.start(config, path).rounds(), rounds + 1))
        list(runs.resume(path).rounds())
        assert adapter_hash(path) == adapter_hash(tmp_path / "whole")
    assert adapter_hash(tmp_path / "plain") != adapter_hash(tmp_path / "whole")


@each_optimizer
def test_a_checkpoint_holds_what_is_remembered_of_both_factors(
    site: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(site, [f"aggregate.optimizer={name}", "train.rounds=2"])
    (*_, last) = runs.start(config, tmp_path / "run").rounds()
    (newest,) = (tmp_path / "run" / "checkpoints").glob("round-000002")
    saved = load_file(newest / "state.safetensors")
    memory = {n.removeprefix("memory/"): t for n, t in saved.items() if n.startswith("memory/")}
    assert same(memory, last.state.server.memory)
    assert {role_of(key) for key in memory} == {"A", "B", "head"}


def configured(*overrides: str) -> Any:
    return make_config(LEAST, overrides)


def test_the_configured_optimizer_has_the_configured_settings_and_the_papers_defaults() -> None:
    def ends(reducer: Reducer) -> AdapterState:
        return play(reducer, 4)[-1].adapter

    def by(*overrides: str) -> AdapterState:
        return ends(compose(configured(*overrides).aggregate.rules))

    assert same(by(), ends(mean()))
    assert same(by("aggregate.optimizer=fedavgm"), ends(fedavgm(mean(), lr=1.0, momentum=0.9)))
    assert same(
        by("aggregate.optimizer=fedadam"),
        ends(fedadam(mean(), lr=0.01, beta1=0.9, beta2=0.99, tau=1e-3)),
    )
    both = ("aggregate.server_lr=0.2", "aggregate.server_momentum=0.3")
    assert same(
        by("aggregate.optimizer=fedavgm", *both), ends(fedavgm(mean(), lr=0.2, momentum=0.3))
    )
    more = (*both, "aggregate.server_beta2=0.7", "aggregate.server_tau=0.01")
    adam = by("aggregate.optimizer=fedadam", *more, "aggregate.reducer=median")
    assert same(adam, ends(fedadam(median(), lr=0.2, beta1=0.3, beta2=0.7, tau=0.01)))
    clipped = by("aggregate.optimizer=fedavgm", "aggregate.clip_norm=0.05")
    assert same(clipped, ends(fedavgm(clip(mean(), norm=0.05))))


@each_optimizer
@pytest.mark.parametrize("method", method_names())
def test_methods_whose_server_does_more_than_average_refuse_and_name_those_that_do_not(
    name: str, method: str
) -> None:
    config = configured(f"aggregate.optimizer={name}", f"method.name={method}")
    if method in AVERAGED:
        assert Experiment(config).method.name == method
        return
    with pytest.raises(ConfigError) as caught:
        _ = Experiment(config).method
    said = str(caught.value)
    assert said.startswith(f"{method} does not support the server optimizer '{name}'")
    assert said.endswith(f"use one of {', '.join(AVERAGED)}")
    assert "\n" not in said


def test_a_server_optimizer_in_a_list_of_reducers_is_the_same_and_refused_alike() -> None:
    listed = configured('aggregate.reducer=["fedavgm", "median"]')
    keyed = configured("aggregate.reducer=median", "aggregate.optimizer=fedavgm")
    assert listed.aggregate.rules == keyed.aggregate.rules
    with pytest.raises(ConfigError, match="flora does not support the server optimizer 'fedavgm'"):
        _ = Experiment(
            configured("method.name=flora", 'aggregate.reducer=["fedavgm", "mean"]')
        ).method


@pytest.mark.parametrize("method", AVERAGED)
def test_all_clients_of_a_method_that_averages_start_from_the_server_s_own_tensors(
    method: str,
) -> None:
    chosen = get_method(method)
    server = ServerState(random_state(make_specs(), 1, torch.float64))
    for rank in (1, 2):
        assert chosen.download(server, ClientInfo("ann", 10, rank, 1)) == server.adapter


def test_compare_refuses_before_the_first_run_what_it_would_refuse_at_a_later_one(
    site: Path,
) -> None:
    config = load_config(site, ["aggregate.optimizer=fedavgm"])
    with pytest.raises(ConfigError, match="centralized does not support"):
        grid.plan(config, {"rolora": (), "centralized": ()}, [0])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer=fedyogi", "aggregate.optimizer: Input should be 'none', 'fedavgm' or"),
        ("server_lr=0", "aggregate.server_lr: Input should be greater than 0"),
        ("server_momentum=1", "aggregate.server_momentum: Input should be less than 1"),
        ("server_beta2=1", "aggregate.server_beta2: Input should be less than 1"),
        ("server_tau=0", "aggregate.server_tau: Input should be greater than 0"),
    ],
)
def test_a_setting_out_of_range_is_named_in_one_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(f"aggregate.{override}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["server_lr=0.5"], "aggregate.server_lr has no effect: it is for fedavgm and fedadam"),
        (
            ["optimizer=fedavgm", "server_beta2=0.5"],
            "aggregate.server_beta2 has no effect: it is for fedadam",
        ),
        (["reducer=median", "trim=0.2"], "aggregate.trim has no effect: it is for trimmed_mean"),
        (
            ["optimizer=fedavgm", "server_lr=0.5", "options.fedavgm.lr=0.2"],
            "give aggregate.server_lr or aggregate.options.fedavgm.lr, not both",
        ),
        (
            ["clip_norm=1", "options.clip.norm=2.0"],
            "give aggregate.clip_norm or aggregate.options.clip.norm, not both",
        ),
    ],
)
def test_a_key_without_effect_is_refused_for_all_methods_and_for_one(
    overrides: list[str], said: str, site: Path
) -> None:
    given = [f"aggregate.{override}" for override in overrides]
    with pytest.raises(ConfigError, match=said):
        load_config(site, given)
    with pytest.raises(ConfigError, match=said):
        grid.plan(load_config(site), {"fedit": given}, [0])


def test_fedexp_steps_by_moves_as_clipping_leaves_them_and_by_no_rule_that_cuts_some() -> None:
    def ends(*overrides: str) -> AdapterState:
        return play(compose(configured(*overrides).aggregate.rules), 4)[-1].adapter

    least = "aggregate.options.fedexp={epsilon=1e-9}"
    clipped = ends("aggregate.reducer=fedexp", "aggregate.clip_norm=0.05", least)
    assert same(clipped, play(clip(fedexp(epsilon=1e-9), norm=0.05), 4)[-1].adapter)
    assert not same(clipped, ends("aggregate.clip_norm=0.05")), "steps are longer"
    assert not same(ends("aggregate.reducer=fedexp"), ends("aggregate.reducer=fedexp", least))
    for rules, said in (
        ('["fedexp", "median"]', "'fedexp' wraps no other"),
        ("fedexp", "withstands no client"),
    ):
        with pytest.raises(ConfigError, match=said):
            configured(f"aggregate.reducer={rules}", "aggregate.byzantine=1")
    with pytest.raises(ConfigError, match="flora does not support the server optimizer 'fedexp'"):
        _ = Experiment(configured("method.name=flora", "aggregate.reducer=fedexp")).method


@pytest.mark.parametrize(
    "make",
    [
        lambda: fedexp(epsilon=0.0),
        lambda: fedavgm(mean(), lr=0.0),
        lambda: fedavgm(mean(), momentum=1.0),
        lambda: fedadam(mean(), lr=-1.0),
        lambda: fedadam(mean(), beta1=1.0),
        lambda: fedadam(mean(), beta2=-0.1),
        lambda: fedadam(mean(), tau=0.0),
    ],
)
def test_a_reducer_with_a_setting_out_of_range_is_not_made(make: Callable[[], Reducer]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        make()
