"""Claims about robust rules in runs: every method, both engines, configuration, records, page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import calls
import pytest
import torch
from states import assign as assigned_to
from states import effect, make_specs, start_of, updates_from
from synthetic_runs import write_run
from typer.testing import CliRunner

from rolora.algorithm.adapter import AdapterState, ClientInfo, Update
from rolora.algorithm.method import ServerState
from rolora.algorithm.reduce import Reducer, mean, trimmed_mean
from rolora.algorithm.robust import fltrust, krum, nnm
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, RoundReport, step
from rolora.cli.main import app
from rolora.config.load import config_hash, load_config
from rolora.errors import ConfigError, NoQuorum
from rolora.methods import get_method, method_names
from rolora.report.page import spans, write_report
from rolora.results.defence import Cut, cuts, defence
from rolora.results.runs import load_run
from rolora.run import runs

pytestmark = pytest.mark.usefixtures("quick")
SUSPECT = ["aggregate.byzantine=1", "train.participation=1.0", "eval.every=9"]
TRUSTING = ["aggregate.reducer=fltrust", "aggregate.trusted=client-001", "eval.every=9"]
KEYS = {10: "site-ann", 11: "site-bob", 12: "site-cy"}
REFUSED = {
    "centralized": "trains on the rows of all clients together, so 'nnm' has no one to leave out",
    "lora_a2": "averages pieces that not every client sends",
}
every_method = pytest.mark.parametrize("name", method_names())


def robust() -> Reducer:
    return nnm(trimmed_mean(byzantine=2), byzantine=2)


def spoiled(update: Update, size: float) -> Update:
    """An update of noise this large."""
    rng = generator(7, "noise")
    tensors = {n: torch.randn(t.shape, generator=rng) * size for n, t in update.adapter.items()}
    return replace(update, adapter=AdapterState(tensors, update.adapter.scaling))


def after_rounds(
    name: str,
    reducer: Reducer,
    size: float | None,
    rounds: int = 2,
    *,
    bad: int = 2,
    trusted: str | None = None,
) -> tuple[ServerState, list[RoundReport]]:
    """The server after some rounds of nine clients, of which the first send noise of this size."""
    method, reports = get_method(name), []
    server = ServerState(start_of(method, make_specs(), 0, scale=0.3))
    for round in range(1, rounds + 1):
        infos = [ClientInfo(f"client-{n}", 5, 2, round) for n in range(9)]
        cohort = assigned_to(method, server, infos)
        updates = updates_from(method, cohort, 10 * round, size=0.02)
        if size is not None:
            updates[:bad] = [spoiled(update, size) for update in updates[:bad]]
        rng = generator(0, "aggregate", round)
        aggregation = Aggregation(reducer, trusted=trusted)
        server, report = step(method, aggregation, server, cohort, updates, rng)
        reports.append(report)
    return server, reports


def far(one: ServerState, other: ServerState) -> float:
    ones, others = effect(one.adapter), effect(other.adapter)
    return math.sqrt(sum(float((ones[k] - others[k]).double().square().sum()) for k in ones))


@pytest.mark.parametrize("name", sorted({*method_names()} - {"local", "centralized", "lora_a2"}))
def test_two_bad_clients_of_nine_take_no_method_off_its_way(name: str) -> None:
    clean, _ = after_rounds(name, mean(), None)
    start = ServerState(start_of(get_method(name), make_specs(), 0, scale=0.3))
    held, reports = after_rounds(name, robust(), 1e4)
    lost, _ = after_rounds(name, mean(), 1e4)
    way = far(clean, start)
    assert far(held, clean) < 1.5 * way
    assert far(lost, clean) > 20 * way
    for report in reports:
        bad = [report.cut["client-0"], report.cut["client-1"]]
        assert min(bad) > 0.7
        honest = [share for client, share in report.cut.items() if client[-1] not in "01"]
        assert max(honest, default=0.0) < min(bad)


@every_method
def test_every_method_runs_with_mixing_and_a_trimmed_mean_or_says_why_not(
    name: str, site: Path, tmp_path: Path
) -> None:
    config = load_config(site, [f"method.name={name}", "train.rounds=2", *SUSPECT])
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]) as caught:
            runs.start(config, tmp_path / "run")
        assert "\n" not in str(caught.value)
        return
    results = list(runs.start(config, tmp_path / "run").rounds())
    assert [(result.round, result.advanced) for result in results] == [(0, 1), (1, 1), (2, 1)]
    assert all(math.isfinite(value) for value in results[-1].metrics.values())


@every_method
def test_every_method_runs_beside_a_trusted_client_or_says_why_not(
    name: str, site: Path, tmp_path: Path
) -> None:
    overrides = [f"method.name={name}", "train.rounds=2", "train.participation=0.6", *TRUSTING]
    config = load_config(site, overrides)
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name].replace("nnm", "fltrust")):
            runs.start(config, tmp_path / "run")
        return
    results = list(runs.start(config, tmp_path / "run").rounds())
    assert [(result.round, result.advanced) for result in results] == [(0, 1), (1, 1), (2, 1)]
    assert all("client-001" in result.cohort for result in results[1:])
    assert all(len(result.cohort) == 3 for result in results[1:])
    assert all("client-001" not in result.cut for result in results)


@pytest.mark.parametrize("name", sorted({*method_names()} - {"local", "centralized", "lora_a2"}))
def test_seven_bad_clients_of_nine_take_no_method_off_the_way_of_a_trusted_one(name: str) -> None:
    clean, _ = after_rounds(name, mean(), None)
    start = ServerState(start_of(get_method(name), make_specs(), 0, scale=0.3))
    held, reports = after_rounds(name, fltrust(byzantine=7), 1e4, bad=7, trusted="client-8")
    # nine that go nine ways: one goes three times as far as their mean
    assert far(held, clean) < 4 * far(clean, start)
    assert not any("client-8" in report.cut for report in reports)


@pytest.mark.parametrize("rule", ["median", "geometric_median", "centered_clip"])
@pytest.mark.parametrize("name", ["rolora", "fedit", "flexlora", "ravan"])
def test_runs_use_each_rule_that_needs_few(
    name: str, rule: str, site: Path, tmp_path: Path
) -> None:
    overrides = [f"method.name={name}", f"aggregate.reducer={rule}", "train.rounds=2", *SUSPECT]
    results = list(runs.start(load_config(site, overrides), tmp_path / "run").rounds())
    assert results[-1].advanced


@pytest.mark.parametrize("rule", ['["nnm", "krum"]', "multi_krum", '["clip_product", "krum"]'])
def test_runs_use_each_rule_that_chooses(rule: str, site: Path, tmp_path: Path) -> None:
    product = ["aggregate.options.clip_product.norm=0.1"] if "product" in rule else []
    overrides = [f"aggregate.reducer={rule}", "train.rounds=2", *product, *SUSPECT]
    results = list(runs.start(load_config(site, overrides), tmp_path / "run").rounds())
    assert results[-1].advanced
    assert results[-1].cut


def test_sites_and_one_process_end_with_the_same_bits_and_cut_the_same(tmp_path: Path) -> None:
    place = calls.make_place(tmp_path)
    overrides = ("aggregate.byzantine=1", "train.rounds=3", "train.participation=1.0")
    config = calls.configuration(place, *overrides)
    here = list(runs.start(config, tmp_path / "here").rounds())
    there = list(
        calls.remote(config, tmp_path / "there", calls.calls(place, tmp_path / "state")).rounds()
    )
    assert here[-1].state.server.adapter == there[-1].state.server.adapter
    assert [one.cut for one in here] == [one.cut for one in there]
    assert any(one.cut for one in here)


def test_a_trusted_site_and_a_trusted_client_make_the_same_run(tmp_path: Path) -> None:
    place = calls.make_place(tmp_path)
    overrides = ("aggregate.reducer=fltrust", "aggregate.trusted=site-bob", "train.rounds=4")
    config = calls.configuration(place, *overrides)
    here = list(runs.start(config, tmp_path / "here").rounds())
    transport = calls.calls(place, tmp_path / "state")
    there = list(calls.remote(config, tmp_path / "there", transport, KEYS).rounds())
    assert here[-1].state.server.adapter == there[-1].state.server.adapter
    assert [one.cohort for one in here] == [one.cohort for one in there]
    assert all("site-bob" in one.cohort and len(one.cohort) == 2 for one in there[1:])
    assert [one.cut for one in here] == [one.cut for one in there]


def test_a_trusted_site_is_waited_for_though_spare_ones_have_answered(tmp_path: Path) -> None:
    place = calls.make_place(tmp_path)
    overrides = ("aggregate.trusted=site-ann", "train.rounds=3", "federation.spare=1")
    config = calls.configuration(place, "aggregate.reducer=fltrust", *overrides)
    transport = calls.calls(place, tmp_path / "state")  # the largest answers last
    results = list(calls.remote(config, tmp_path / "run", transport, KEYS).rounds())[1:]
    assert all(result.advanced and "site-ann" in result.clients for result in results)
    assert all(len(result.cohort) == 3 for result in results)


def test_a_run_whose_trusted_site_is_not_there_says_so(tmp_path: Path) -> None:
    place = calls.make_place(tmp_path)
    overrides = ("aggregate.reducer=fltrust", "aggregate.trusted=site-cy", "train.rounds=3")
    config = calls.configuration(place, *overrides, "federation.sites=2", "federation.wait=1.5")
    transport = calls.calls(place, tmp_path / "state")
    transport.away.add("site-cy")
    said = r"site site-cy, which is trusted \(aggregate.trusted\), is not connected"
    with pytest.raises(NoQuorum, match=said):
        list(calls.remote(config, tmp_path / "run", transport, KEYS).rounds())
    transport.away.clear()
    rounds = calls.remote(config, tmp_path / "run", transport, KEYS).rounds()
    next(rounds), next(rounds)
    transport.away.add("site-cy")
    with pytest.raises(NoQuorum, match=said):
        list(rounds)


def test_a_site_is_not_trusted_by_a_name_that_any_site_could_take(tmp_path: Path) -> None:
    place = calls.make_place(tmp_path)
    config = calls.configuration(place, "aggregate.trusted=site-cy")
    transport = calls.calls(place, tmp_path / "state")
    with pytest.raises(ConfigError, match="any site could take this name") as caught:
        calls.remote(config, tmp_path / "run", transport)
    assert "\n" not in str(caught.value)
    assert not transport.passed


def test_a_run_that_is_resumed_trusts_the_same_client_and_ends_the_same(
    site: Path, tmp_path: Path
) -> None:
    config = load_config(site, ["train.rounds=3", *TRUSTING])
    whole = list(runs.start(config, tmp_path / "whole").rounds())
    first = runs.start(config, tmp_path / "parts").rounds()
    for result in first:
        if result.round == 1:
            first.close()
    resumed = runs.resume(tmp_path / "parts")
    assert resumed.experiment.config.aggregate.trusted == "client-001"
    rest = list(resumed.rounds())
    assert rest[-1].state.server.adapter == whole[-1].state.server.adapter
    file = tmp_path / "parts" / "config.toml"
    file.write_text(file.read_text().replace('"client-001"', '"client-002"'))
    with pytest.raises(ConfigError, match=r"the configuration of .* changed"):
        runs.resume(tmp_path / "parts", rounds=4)


def test_a_run_that_is_resumed_draws_the_same_buckets(site: Path, tmp_path: Path) -> None:
    overrides = ['aggregate.reducer=["bucketing", "median"]', "train.rounds=3", "eval.every=9"]
    config = load_config(site, [*overrides, "train.participation=1.0"])
    whole = list(runs.start(config, tmp_path / "whole").rounds())
    first = runs.start(config, tmp_path / "parts").rounds()
    for result in first:
        if result.round == 1:
            first.close()
    rest = list(runs.resume(tmp_path / "parts").rounds())
    assert rest[-1].state.server.adapter == whole[-1].state.server.adapter


def test_with_fewer_updates_than_the_rule_needs_the_round_does_not_advance() -> None:
    method = get_method("rolora")
    server = ServerState(start_of(method, make_specs(), 0))
    cohort = assigned_to(method, server, [ClientInfo(f"c-{n}", 5, 2, 1) for n in range(5)])
    updates = updates_from(method, cohort)
    for came, advances in ((5, True), (4, False)):
        rule = Aggregation(krum(byzantine=1))
        after, report = step(method, rule, server, cohort, updates[:came], generator(0))
        assert (report.quorum_met, after.round) == (advances, int(advances))
        assert report.cut.keys() <= cohort.keys()
        assert after.attempt == int(not advances)


def test_a_run_of_which_too_few_clients_answer_says_how_many_it_needs(
    tmp_path: Path, site: Path
) -> None:
    place = calls.make_place(tmp_path)
    overrides = ("aggregate.byzantine=1", "train.rounds=3", "train.participation=1.0")
    config = calls.configuration(place, *overrides, "federation.sites=2")
    transport = calls.calls(place, tmp_path / "state")
    transport.away.add("site-cy")
    with pytest.raises(NoQuorum, match="too few for a cohort of 3"):
        list(calls.remote(config, tmp_path / "run", transport).rounds())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["aggregate.byzantine=2", "train.participation=0.6"],
            r"needs 5 updates a round to withstand 2 bad ones .* but a cohort has 3",
        ),
        (
            ["aggregate.byzantine=1", "aggregate.reducer=bulyan"],
            "needs 7 updates a round to withstand 1 bad ones .* but a cohort has 3",
        ),
        (["aggregate.byzantine=1", "aggregate.reducer=mean"], "withstands no client"),
        (["aggregate.byzantine=1", 'aggregate.reducer=["nnm", "mean"]'], "withstands no client"),
        (["aggregate.byzantine=1", "aggregate.trim=0.2"], "give trim or byzantine, not both"),
        (["aggregate.byzantine=-1"], "aggregate.byzantine: Input should be greater than or equal"),
        (["aggregate.byzantine=1.5"], "aggregate.byzantine: Input should be a valid integer"),
        (
            ["aggregate.reducer=fltrust"],
            r"aggregate\.trusted is missing: .* name a client that you",
        ),
        (
            ["aggregate.trusted=client-01"],
            "client-01' is not a client of this run: did you mean 'client-",
        ),
        (["aggregate.trusted="], "aggregate.trusted: String should have at least 1 character"),
        (
            ["aggregate.reducer=fltrust", "aggregate.trusted=client-001", "aggregate.byzantine=2"],
            r"\['fltrust'\] needs 4 updates a round to withstand 2 bad ones .* a cohort has 3",
        ),
        (
            ['aggregate.reducer=["nnm", "fltrust"]', "aggregate.trusted=client-001"],
            "nnm mixes updates, so the rule behind it could not tell the trusted client's",
        ),
        (['aggregate.reducer=["krum", "mean"]'], "reducer 'krum' wraps no other"),
        (["aggregate.reducer=nnm"], "reducer 'nnm' wraps another one: add a rule"),
        (['aggregate.reducer=["clip_product", "krum"]'], "clip_product.norm is missing"),
    ],
)
def test_a_rule_that_cannot_keep_its_promise_is_one_line_before_the_run(
    overrides: Sequence[str], said: str, site: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        runs.start(load_config(site, overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_suspects_without_a_rule_are_met_by_mixing_and_a_trimmed_mean(site: Path) -> None:
    config = load_config(site, ["aggregate.byzantine=1"])
    assert config.aggregate.reducer == ["nnm", "trimmed_mean"]
    assert [(n, o["byzantine"]) for n, o in config.aggregate.rules] == [
        ("nnm", 1),
        ("trimmed_mean", 1),
    ]
    chosen = load_config(site, ["aggregate.byzantine=1", "aggregate.reducer=krum"])
    assert chosen.aggregate.rules == [("krum", {"byzantine": 1})]
    assert load_config(site).aggregate.rules == [("mean", {})]
    with pytest.raises(ConfigError, match=r"aggregate\.trusted is missing"):
        load_config(site, ["aggregate.reducer=fltrust"])


def test_nobody_suspected_is_the_run_that_it_was_before_there_was_such_a_key(site: Path) -> None:
    plain, zero = load_config(site), load_config(site, ["aggregate.byzantine=0"])
    assert config_hash(plain) == config_hash(zero)
    assert config_hash(plain) != config_hash(load_config(site, ["aggregate.byzantine=1"]))
    assert config_hash(plain) != config_hash(load_config(site, ["aggregate.trusted=client-001"]))


def test_the_command_line_takes_suspects_and_says_what_they_cost(
    site: Path, tmp_path: Path
) -> None:
    given = ["train.rounds=1", "train.participation=1.0", "--suspicious", "1"]
    result = CliRunner().invoke(app, ["run", str(site), *given, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.stderr.splitlines() if "may send anything" in line]
    assert "1 client of a round may send anything (nnm, then trimmed_mean)" in said
    assert "holds all updates of a round in memory" in said
    assert "aggregate.weights are ignored" in said
    assert "byzantine = 1" in (tmp_path / "run" / "config.toml").read_text()


def test_a_rule_that_keeps_weights_of_another_number_of_clients_is_an_error() -> None:
    method = get_method("rolora")
    server = ServerState(start_of(method, make_specs(), 0))
    cohort = assigned_to(method, server, [ClientInfo(f"c-{n}", 5, 2, 1) for n in range(3)])
    first = Reducer(
        dict,
        lambda memory, value, reference, weight: memory or dict(value),
        lambda memory, rng: (memory, {"client_weights": torch.ones(2)}),
    )
    with pytest.raises(TypeError, match=r"have shape \(2,\), but 3 clients were reduced"):
        step(method, Aggregation(first), server, cohort, updates_from(method, cohort), generator(0))


def test_rounds_name_who_was_cut_and_plain_means_say_nothing(site: Path, tmp_path: Path) -> None:
    for name, overrides in {"mean": [], "krum": ["aggregate.reducer=krum"]}.items():
        config = load_config(site, ["train.rounds=2", "train.participation=1.0", *overrides])
        list(runs.start(config, tmp_path / name).rounds())
        lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
        found = [json.loads(line).get("cut") for line in lines]
        if name == "mean":
            assert found == [None, None, None]
        else:  # all but the one that was chosen
            assert found[0] is None
            assert all(sorted(one.values()) == [1.0] * 4 for one in found[1:])


def with_cuts(folder: Path, cut: dict[str, float]) -> Path:
    """A finished run in which these clients were cut, in each round that they took part in."""
    path = write_run(folder, clients=6, rounds=10)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["cut"] = {client: share for client, share in cut.items() if client in line["clients"]}
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_client_that_is_cut_in_most_rounds_is_named_on_the_page(tmp_path: Path) -> None:
    path = with_cuts(tmp_path / "run", {"client-001": 0.9, "client-002": 0.3})
    run = load_run(path)
    first, second, *others = cuts(run)
    took = [line["round"] for line in run.rounds if "client-001" in line["clients"]]
    assert first == Cut("client-001", len(took), tuple(took), first.mean)
    assert first.mean == pytest.approx(0.9)
    assert (second.client, second.mostly, second.in_most_rounds) == ("client-002", (), False)
    assert {one.mean for one in others} == {0.0}
    page = write_report([path], tmp_path / "page.html").read_text()
    named = f"client-001 ({len(took)} of {len(took)})"
    assert f"cut by more than half in most of their rounds: {named}" in page
    assert "<strong>client-001</strong>" in page
    assert "<strong>client-002</strong>" not in page
    assert "Whose updates were cut" in page
    assert f"<td>{len(took)}</td><td>{spans(took, 8)}</td><td>90%</td>" in page
    assert "<th>attacks</th>" not in page  # of clients that are real, nobody knows


def test_a_site_that_did_not_answer_is_not_counted_as_one_that_the_rule_stopped(
    tmp_path: Path,
) -> None:
    path = with_cuts(tmp_path / "run", {"client-001": 0.9})
    with (path / "config.toml").open("a") as file:
        file.write('[aggregate]\nreducer = "median"\n')
    met = defence(load_run(path))
    assert met is not None
    assert met.honest[0] > 0
    silent = "not needed: 2 others answered first (federation.spare)"
    told, rounds = f'"rejected": {{}}, "missing": {{"x": "{silent}"}}', path / "rounds.jsonl"
    before = rounds.read_text()
    rounds.write_text(before.replace('"rejected": {}', told))
    assert load_run(path).rounds[-1]["missing"] == {"x": silent}
    assert defence(load_run(path)) == met
    rounds.write_text(before.replace('"rejected": {}', '"rejected": {"x": "not finite"}'))
    rejected = defence(load_run(path))
    assert rejected is not None
    assert rejected.honest[0] > met.honest[0]


def test_spans_of_rounds_say_how_many_are_left_out() -> None:
    rounds = [1, 2, 3, 7, 9, 10, 12]
    assert spans(rounds) == spans(rounds, 4) == "1-3, 7, 9-10, 12"
    assert spans(rounds, 2) == "1-3, 7, and 2 more"
    assert spans([], 2) == ""


def test_a_rule_that_uses_few_clients_names_nobody(tmp_path: Path) -> None:
    path = with_cuts(tmp_path / "run", {f"client-00{n}": 1.0 for n in range(5)})
    page = write_report([path], tmp_path / "page.html").read_text()
    assert "the rule used few clients a round; 5 of 6 were cut by more than half" in page


def test_a_run_in_which_nobody_was_cut_has_no_table_of_it(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "run")], tmp_path / "page.html").read_text()
    assert "Whose updates were cut" not in page
