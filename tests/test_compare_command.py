"""``rolora compare``: what it prints, where it says it stands, how it stops, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from comparisons import GRID, SMALL, everything, finish, lines, planned
from test_cli import rolora

from rolora.results.published import read_published

pytestmark = pytest.mark.usefixtures("quick")


def command(site: Path, out: Path, *words: str) -> tuple[str, ...]:
    return (
        *("compare", str(site), *SMALL, "--methods", "rolora,fedit", "--seeds", "0,1,2"),
        *("--out", str(out), *words),
    )


def test_a_run_of_the_table_that_diverges_is_named_and_the_rest_is_done(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(site, tmp_path / "all", "fedit:train.lr=1e30", "--json")
    code, out, err = rolora(monkeypatch, capsys, *words)
    assert code == 0
    found = json.loads(out)
    assert {one["run"] for one in found["diverged"]} == {f"fedit-seed{seed}" for seed in (0, 1, 2)}
    assert [row["method"] for row in found["methods"]] == ["rolora"]
    assert "fedit-seed0: diverged; skipping it" in err
    assert (
        "fedit-seed2 diverged and is left out of every mean"
        in (tmp_path / "all/report.html").read_text()
    )


def test_a_spent_budget_stops_between_rounds_and_more_of_it_goes_on(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "all"
    words = (*command(site, path, "--tune", GRID), "--tune-seeds", "100", "--tune-rounds", "1")
    words = (*words, "--methods", "rolora", "--seeds", "0")
    code, _, err = rolora(monkeypatch, capsys, *words, "--budget", "0.000001s")
    assert code == 5
    last = err.splitlines()[-1]
    assert last.startswith("rolora: the budget is spent (")
    assert "0 of 3 runs are done" in last
    assert "continue with the same command and a larger --budget" in last
    assert [line["round"] for line in lines(path / "tuning/rolora-train.lr=1e-2-seed100")] == [0]
    code, _, err = rolora(monkeypatch, capsys, *words, "--budget", "0.000001s")
    assert (code, "round 1" in err) == (5, False)  # nothing is even begun
    code, _, err = rolora(monkeypatch, capsys, *words, "--budget", "9h")
    assert code == 0
    assert "the budget is 9 core-hours, enough for all" in err
    whole = finish(planned(site, methods=["rolora"], seeds=[0]), tmp_path / "whole")
    assert everything(path) == everything(whole)


def test_where_a_queue_stands_and_how_long_it_takes_is_said(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = rolora(monkeypatch, capsys, *command(site, tmp_path / "all"))
    said = err.splitlines()
    assert code == 0
    assert said.index("loading the model and the data ...") < said.index("run 1 of 6: rolora-seed0")
    (sixth,) = (text for text in said if text.startswith("run 6 of 6: fedit-seed2"))
    assert sixth.endswith("left in all")
    (estimate,) = (text for text in said if text.startswith("estimate: 6 runs take about"))
    first_round = next(n for n, text in enumerate(said) if "round 1/2" in text)
    assert said.index(estimate) < first_round
    assert out.splitlines()[-1].endswith("report.html")
    for title in ("equal rounds, after 2 rounds", "equal bytes, after", "equal local compute"):
        assert title in out
    assert "minus rolora [95%]" in out


def test_published_numbers_stand_beside_ours(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(site.parent, tmp_path / "site")) / site.name
    said = {
        "source": "A Paper, table 9",
        "setting": "another model, 50 clients",
        "metric": "accuracy",
        "unit": "percent",
        "results": {"rolora": 94.8, "flexlora": 54.08},
    }
    other.with_suffix(".published.json").write_text(json.dumps(said))
    words = command(other, tmp_path / "all")
    _, text, _ = rolora(monkeypatch, capsys, *words)
    _, answer, _ = rolora(monkeypatch, capsys, *words, "--json")
    found = json.loads(answer)
    ours = {row["method"]: row["final_mean"] for row in found["methods"]}
    rows = {row["method"]: row for row in found["published"]["beside"]}
    assert rows["rolora"]["ours"] == pytest.approx(100 * ours["rolora"])
    assert rows["rolora"]["theirs"] == 94.8
    assert (rows["fedit"]["theirs"], rows["flexlora"]["ours"]) == (None, None)
    for shown in (text, (tmp_path / "all" / "report.html").read_text()):
        for part in ("A Paper, table 9", "another model, 50 clients", "94.80", "54.08"):
            assert part in shown
        assert f"{100 * ours['rolora']:.2f} ± " in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "published.json is damaged: Invalid JSON"),
        (
            '{"source": "s", "setting": "s", "metric": "accuracy", "unit": "%"}',
            "unit: Input should",
        ),
        ('{"source": 1}', "published.json is damaged: source"),
    ],
)
def test_damaged_published_numbers_are_one_line_that_names_the_file(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    says: str,
) -> None:
    other = Path(shutil.copytree(site.parent, tmp_path / "site")) / site.name
    assert read_published(other) is None
    other.with_suffix(".published.json").write_text(text)
    code, _, err = rolora(monkeypatch, capsys, *command(other, tmp_path / "all"))
    assert code == 3
    (last,) = (line for line in err.splitlines() if line.startswith("rolora:"))
    assert says in last
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--tune", "train.lr=1e-3"], 2, "one value leaves nothing to choose"),
        (["--tune", GRID, "--tune-seeds", "2,3"], 2, "seed 2 is in --seeds and --tune-seeds"),
        (["--tune", GRID, "--tune-rounds", "0"], 2, "a run needs at least one round"),
        (["--tune", GRID, "--tune-seeds", "x"], 2, "--tune-seeds 'x': give whole numbers"),
        (["--tune", GRID, "--tune-seeds", "7,7"], 2, "tuning seed 7 is listed twice"),
        (["--tune", "train.lr=fast,slow"], 2, "train.lr: Input should be a valid number"),
        (["--tune", "train.rates=1,2"], 2, "unknown key 'train.rates'"),
        (["--tune", GRID, "fedit:train.lr=1"], 2, "fedit:train.lr is both fixed and in --tune"),
        (["--tune-seeds", "7"], 2, "need --tune with a grid"),
        (["--tune-rounds", "7"], 2, "need --tune with a grid"),
        (["--budget", "0h"], 2, "must be more than zero"),
        (["--budget", "8"], 2, "give core-hours such as 8h"),
        (["--seeds", "0,-1"], 2, "--seeds '0,-1': give whole numbers"),
        (["--seeds", "3,3"], 2, "seed 3 is listed twice"),
        (["--methods", "rolora,rolora"], 2, "method 'rolora' is listed twice"),
        (["--methods", "rolora,rolora+first=B"], 0, ""),
        (["--methods", "rolora+first=C"], 2, "method.first"),
        (["--methods", "rolora+last=A"], 2, "method.last"),
        (["--methods", "roloro"], 2, "unknown method 'roloro': did you mean 'rolora'?"),
        (["fedit:seed=7"], 2, "fedit:seed=7: that would change what is compared"),
        (["fedit:data.train=other.csv"], 2, "that would change what is compared"),
        (["fedit:method.name=rolora"], 2, "that would change what is compared"),
        (
            ["fedti:train.lr=1"],
            2,
            "'fedti' is not among the compared methods: did you mean 'fedit'?",
        ),
        (["federation.on=x"], 2, "compare runs on this machine only"),
        (["data.train=none.csv"], 3, "none.csv"),
    ],
)
def test_a_mistake_ends_with_its_code_and_one_line_and_leaves_no_folder(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr(
        "rolora.cli.progress._follow_queued", lambda *_: (_ for _ in ()).throw(Reached)
    )
    out = tmp_path / "all"
    if code == 0:
        with pytest.raises(Reached):
            rolora(monkeypatch, capsys, *command(site, out, *words))
        return
    got, _, err = rolora(monkeypatch, capsys, *command(site, out, *words))
    said = [line for line in err.splitlines() if line.startswith("rolora:")]
    assert (got, len(said)) == (code, 1), err
    assert says in said[0]
    assert not out.exists()


class Reached(Exception):
    """The first run was about to be followed."""
