"""``rolora attack`` from a configuration to the table and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rolora.attacks.attack import bad_clients
from rolora.cli.main import app
from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.results.defence import Defence, attackers, cuts, defence
from rolora.results.runs import load_run
from rolora.run.runs import resume, start
from rolora.sites.policy import consented
from rolora.sites.site_config import SiteConfig

EVEN = ("train.participation=1", "partition.scheme=iid", "train.rounds=2", "eval.every=2")
pytestmark = pytest.mark.usefixtures("quick")


def attack(site: Path, out: Path, *more: str) -> Any:
    words = ["attack", str(site), *EVEN, "--bad", "1", "--out", str(out), "--json", *more]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_matrix_has_each_method_under_each_attack_and_rule_beside_none(
    site: Path, tmp_path: Path
) -> None:
    out = tmp_path / "attacks"
    words = (
        "--attacks",
        'sign_flip+factor=3,backdoor+trigger="and/or",nan',
        "--rules",
        "mean,nnm+median",
    )
    found = attack(site, out, *words, "--methods", "rolora,fedit", "--seeds", "0,1,2")
    cells = {(c["attack"], c["rule"], c["method"]): c for c in found["cells"]}
    assert [(a, r, m) for a, r, m in cells] == [
        (attack, rule, method)
        for attack in ("none", "sign_flip+factor=3", 'backdoor+trigger="and/or"', "nan")
        for rule in ("mean", "nnm+median")
        for method in ("rolora", "fedit")
    ]
    one = cells["sign_flip+factor=3", "mean", "rolora"]
    runs = [load_run(out / "sign_flip+factor=3" / "mean" / f"rolora-seed{s}") for s in range(3)]
    assert one["values"] == [run.last("accuracy") for run in runs]
    clean = cells["none", "mean", "rolora"]
    assert one["lost"] == pytest.approx(clean["mean"] - one["mean"])
    assert one["interval"][0] <= one["lost"] <= one["interval"][1]
    assert 0 <= cells['backdoor+trigger="and/or"', "mean", "fedit"]["success"] <= 1
    assert one["success"] is None
    page = (out / "report.html").read_text()
    assert "1 client attacks the others, by 3 attacks" in page
    assert page.count('role="img"') == 2


def test_in_every_cell_of_a_study_the_trusted_client_is_there_and_honest(
    site: Path, tmp_path: Path
) -> None:
    (bad,) = bad_clients([f"client-{number:03d}" for number in range(5)], 1, 0)
    words = ("--attacks", "sign_flip+factor=100", "--rules", "mean,fltrust", "--methods", "rolora")
    given = (*words, "--seeds", "0", f"aggregate.trusted={bad}", "train.participation=0.6")
    found = attack(site, tmp_path / "a", *given)
    assert [(cell["attack"], cell["rule"]) for cell in found["cells"]] == [
        (attack, rule) for attack in ("none", words[1]) for rule in ("mean", "fltrust")
    ]
    cohorts = set()
    for folder in tmp_path.glob("a/*/*/rolora-seed0"):
        notes = load_config(folder / "config.toml")
        assert notes.aggregate.trusted == bad
        rounds = load_run(folder).rounds[1:]
        assert all(bad in line["cohort"] for line in rounds)
        cohorts.add(str([line["cohort"] for line in rounds]))
        assert (notes.aggregate.byzantine > 0) == (notes.aggregate.reducer == ["fltrust"])
    assert len(cohorts) == 1


def test_an_attack_study_that_was_stopped_goes_on_and_repeats_nothing(
    site: Path, tmp_path: Path
) -> None:
    words = ("--attacks", "ipm", "--rules", "mean", "--methods", "rolora,ffa_lora", "--seeds", "0")
    first = attack(site, tmp_path / "a", *words)
    last = tmp_path / "a" / "ipm" / "mean" / "ffa_lora-seed0"
    done = {
        file: file.stat().st_mtime_ns
        for file in tmp_path.glob("a/*/*/*/rounds.jsonl")
        if file.parent != last
    }
    assert len(done) == 3
    (last / "report.html").unlink()
    again = attack(site, tmp_path / "a", *words)
    assert again["cells"] == first["cells"]
    assert {file: file.stat().st_mtime_ns for file in done} == done


def test_an_attacked_run_resumes_to_the_same_bytes(site: Path, tmp_path: Path) -> None:
    told = ["attack.name=alie", "aggregate.byzantine=1", *EVEN, "train.rounds=4"]
    whole = start(load_config(site, told), tmp_path / "whole")
    list(whole.rounds())
    rounds = start(load_config(site, told), tmp_path / "halved").rounds()
    for result in rounds:
        if result.round == 2:
            break
    rounds.close()
    list(resume(tmp_path / "halved").rounds())
    bytes_of = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "halved")
    ]
    assert bytes_of[0] == bytes_of[1]


def test_a_run_names_its_bad_clients_and_the_rule_cuts_them(site: Path, tmp_path: Path) -> None:
    told = ["attack.name=gauss", "aggregate.byzantine=1", *EVEN]
    run = start(load_config(site, told), tmp_path / "run")
    list(run.rounds())
    (bad,) = bad_clients(run.experiment.rows.shards, 1, 0)
    assert f"an experiment: bad clients {bad} attack (gauss)" in run.notes
    record = load_run(tmp_path / "run")
    assert [one.client for one in cuts(record) if one.in_most_rounds] == [bad]
    assert attackers(record) == {bad}
    assert [one.client for one in cuts(record) if one.attacks] == [bad]
    met = defence(record)
    assert met == Defence("nnm, trimmed_mean, against 1", "gauss", (bad,), (2, 2), (0, 8), None)


def test_rejected_updates_of_attackers_count_as_stopped_and_the_trusted_client_is_none_of_them(
    site: Path, tmp_path: Path
) -> None:
    (bad,) = bad_clients([f"client-{number:03d}" for number in range(5)], 1, 0)
    told = ["attack.name=nan", f"aggregate.trusted={bad}", *EVEN]
    run = start(load_config(site, told), tmp_path / "run")
    last = list(run.rounds())[-1]
    met = defence(load_run(tmp_path / "run"))
    assert met is not None
    assert met.attackers == tuple(last.rejected) != (bad,)
    assert (met.rule, met.attack, met.bad, met.honest) == ("mean", "nan", (2, 2), (0, 8))
    honest = start(load_config(site, [*EVEN]), tmp_path / "honest")
    list(honest.rounds())
    assert defence(load_run(tmp_path / "honest")) is None


def test_updates_that_are_no_numbers_change_nothing_for_the_others(
    site: Path, tmp_path: Path
) -> None:
    run = start(load_config(site, ["attack.name=nan", *EVEN]), tmp_path / "run")
    results = list(run.rounds())
    (bad,) = bad_clients(run.experiment.rows.shards, 1, 0)
    assert all(set(one.rejected) == {bad} for one in results[1:])
    assert all(one.advanced for one in results)


def test_a_coordinator_cannot_make_a_site_attack(site: Path) -> None:
    told = load_config(site, ["attack.name=label_flip"])
    ann = SiteConfig(name="ann", data="train.csv", text="text", label="label", root=site.parent)
    assert consented(ann, told).attack.name == "none"


def test_a_configuration_that_has_an_attack_already_is_refused(site: Path, tmp_path: Path) -> None:
    words = ["attack", str(site), "attack.name=nan", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError)
    assert "remove it from the configuration" in str(result.exception)
