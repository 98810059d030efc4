"""The paper's linear model: its claims, formulas to hold them against, and the command."""

from __future__ import annotations

import doctest
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor

import rolora.theory.curves
from rolora.algorithm.seeding import generator
from rolora.cli import main as cli
from rolora.errors import ConfigError
from rolora.report.figures import save_picture
from rolora.report.theory_figure import theory_figure
from rolora.report.theory_text import round_cells, sweep_cells, theory_verdicts
from rolora.theory.curves import (
    Outcome,
    best_b,
    expected,
    fedit_round,
    gradient_of_a,
    loss,
    population_sin,
    rolora_round,
    simulate,
)
from rolora.theory.linear_model import Problem, Setting, draw_problem, sine, unit
from rolora.theory.sweeps import VALUES, measure, plan_sweep

ROUNDING = 1e-13
SMALL = Setting(dimension=20, samples=60, clients=4, width=6, heterogeneity=0.7, noise=0.2)


def run(**changes: object) -> Outcome:
    """The default experiment with these settings changed."""
    return simulate(draw_problem(replace(Setting(), **changes)))  # type: ignore[arg-type]


def sines(outcome: Outcome) -> list[float]:
    """RoLoRA's sin θ at the start and after each round."""
    return [outcome.setting.delta0, *(one.sin for one in outcome.rounds)]


def isotropic(setting: Setting) -> Problem:
    """The problem with rows whose columns are orthogonal: what infinitely many rows would be."""
    drawn = draw_problem(replace(setting, noise=0.0))
    x = torch.linalg.qr(drawn.x).Q * math.sqrt(setting.samples)
    y = (x @ drawn.a_star)[..., None] * drawn.b_stars[:, None]
    return replace(drawn, x=x, y=y)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return run()


def test_rolora_finds_the_direction_to_1e_9_within_60_rounds(outcome: Outcome) -> None:
    assert outcome.setting == Setting(50, 200, 5, eta=0.25, delta0=0.9, rounds=60)
    assert outcome.rounds[-1].sin < 1e-9
    assert outcome.rounds[-1].loss_rolora < 1e-18


def test_ffa_lora_stays_within_5_percent_of_the_floor_that_its_angle_leaves(
    outcome: Outcome,
) -> None:
    assert {one.loss_ffa for one in outcome.rounds} == {outcome.rounds[0].loss_ffa}
    assert outcome.rounds[-1].loss_ffa == pytest.approx(0.9**2, rel=0.05)
    assert outcome.rounds[-1].loss_rolora < 1e-18 * outcome.rounds[-1].loss_ffa


def test_over_seeds_ffa_lora_s_loss_scatters_around_its_floor_as_rows_do() -> None:
    losses = [run(seed=seed, rounds=1).rounds[0].loss_ffa / 0.81 - 1 for seed in range(1, 21)]
    sd = math.sqrt(2 / 1000)  # of ‖X v‖² / ‖v‖² / rows
    assert abs(fmean(losses)) < 3 * sd / math.sqrt(20)
    assert max(map(abs, losses)) < 4 * sd


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dimension": 10, "width": 1},
        {"dimension": 150, "samples": 600},
        {"clients": 1, "samples": 1000},
        {"clients": 20},
        {"delta0": 0.5},
        {"delta0": 0.99},
        {"b_norm": 0.5, "eta": 1.0},
        {"b_norm": 2.0, "eta": 0.06},
        {"samples": 20},
    ],
    ids=str,
)
def test_every_round_shrinks_the_angle_at_least_as_the_theorem_says(
    changes: dict[str, float], seed: int
) -> None:
    found = run(seed=seed, rounds=30, **changes)
    setting = found.setting
    factor = math.sqrt(1 - setting.eta * (1 - setting.delta0**2) * setting.b_norm**2)
    assert 0 < factor < 1
    for before, after in pairwise(sines(found)):
        assert after <= factor * before + ROUNDING
    for one in found.rounds:
        assert one.bound == pytest.approx(setting.delta0 * factor**one.round, rel=1e-12)
        assert one.sin <= one.bound + ROUNDING


@pytest.mark.parametrize(("eta", "b_norm"), [(0.25, 1.0), (0.4, 1.0), (0.1, 1.5)])
@pytest.mark.parametrize("delta0", [0.3, 0.9, 0.99])
def test_with_orthogonal_columns_each_round_is_the_formula_for_infinitely_many_rows(
    eta: float, b_norm: float, delta0: float
) -> None:
    setting = Setting(eta=eta, b_norm=b_norm, delta0=delta0, rounds=15)
    found = simulate(isotropic(setting))
    for before, after in pairwise(sines(found)):
        assert after == pytest.approx(population_sin(before, eta, b_norm), rel=1e-9, abs=1e-14)
        cosine2 = 1 - before**2
        assert after <= before * (1 - 2 * eta * cosine2 * b_norm**2) + 1e-14
    assert sines(found) == pytest.approx(found.population(), rel=1e-9, abs=1e-14)
    assert found.rounds[0].loss_ffa == pytest.approx(delta0**2 * b_norm**2, rel=1e-12)


def test_with_very_many_random_rows_the_first_rounds_are_close_to_that_formula() -> None:
    found = run(samples=20_000, width=2, rounds=3)
    assert sines(found) == pytest.approx(found.population(), rel=0.03)


def test_b_is_where_its_gradient_vanishes_and_the_gradient_of_a_is_autograd_s() -> None:
    problem = draw_problem(SMALL)

    def client_loss(client: int, a: Tensor, b: Tensor) -> Tensor:
        residual = torch.outer(problem.x[client] @ a, b) - problem.y[client]
        return residual.square().sum() / SMALL.samples

    a, own_b = problem.a_start, best_b(problem, problem.a_start)
    shared = own_b.mean(dim=0)
    for b in (own_b, shared):
        gradients = gradient_of_a(problem, a, b)
        for client in range(SMALL.clients):
            free_a = a.clone().requires_grad_()
            free_b = (b if b.dim() == 1 else b[client]).clone().requires_grad_()
            value = client_loss(client, free_a, free_b)
            of_a, of_b = torch.autograd.grad(value, (free_a, free_b))
            torch.testing.assert_close(gradients[client], of_a, rtol=1e-11, atol=1e-12)
            if b.dim() == 2:
                assert of_b.abs().max() < 1e-12
    each = [float(client_loss(client, a, shared)) for client in range(SMALL.clients)]
    assert loss(problem, a, shared) == pytest.approx(fmean(each), rel=1e-12)


def test_a_keeps_norm_1_and_the_start_is_exactly_as_far_off_as_asked() -> None:
    for delta0 in (1e-8, 0.3, 0.9, 0.999):
        problem = draw_problem(replace(SMALL, delta0=delta0))
        assert sine(problem.a_start, problem.a_star) == pytest.approx(delta0, rel=1e-7)
        for a in (problem.a_star, problem.a_start, rolora_round(problem, problem.a_start)[0]):
            assert float(a.norm()) == pytest.approx(1, abs=1e-14)
        assert problem.b_stars.norm(dim=1) == pytest.approx(torch.ones(4).double(), abs=1e-14)


def test_heterogeneity_is_the_sine_of_each_client_s_angle() -> None:
    alike = draw_problem(replace(SMALL, heterogeneity=0.0)).b_stars[0]
    for own in draw_problem(SMALL).b_stars:
        assert sine(own, alike) == pytest.approx(0.7, rel=1e-12)


def test_the_aggregation_error_of_fedavg_is_that_of_dense_products() -> None:
    problem = draw_problem(SMALL)
    a, b, error = fedit_round(problem, problem.a_start)
    own_b = best_b(problem, problem.a_start)
    own_a = [
        unit(problem.a_start - SMALL.eta * gradient)
        for gradient in gradient_of_a(problem, problem.a_start, own_b)
    ]
    mean = sum((torch.outer(x, y) for x, y in zip(own_a, own_b, strict=True)), torch.zeros(20, 6))
    mean = mean / SMALL.clients
    torch.testing.assert_close(a, unit(torch.stack(own_a).mean(dim=0)))
    torch.testing.assert_close(b, own_b.mean(dim=0))
    assert error == pytest.approx(float((mean - torch.outer(a, b)).norm() / mean.norm()), rel=1e-9)
    assert error > 0.01


def test_fedavg_s_averages_are_inexact_and_it_converges_here_all_the_same(
    outcome: Outcome,
) -> None:
    assert 0.001 < outcome.fedit_error[0] < 0.1
    assert outcome.fedit_error[-1] < 1e-14
    assert outcome.fedit_sin[-1] < 1e-9
    # by itself a client is its federation
    alone = run(clients=1, rounds=10)
    assert alone.fedit_sin == pytest.approx([one.sin for one in alone.rounds], rel=1e-9)
    assert max(alone.fedit_error) < 1e-14


def test_with_few_noisy_rows_fedavg_stays_inexact_and_rolora_comes_closer() -> None:
    found = [run(samples=20, noise=1.0, seed=seed) for seed in range(5)]
    assert min(one.fedit_error[-1] for one in found) > 0.3
    assert all(one.rounds[-1].sin < one.fedit_sin[-1] for one in found)
    assert all(one.rounds[-1].loss_rolora < one.rounds[-1].loss_fedit for one in found)


def test_noise_leaves_an_angle_and_a_loss_that_the_formulas_foretell() -> None:
    for noise in (0.03, 0.3):
        found = [run(noise=noise, seed=seed) for seed in range(5)]
        floor = noise * math.sqrt(49 / 1000)
        assert found[0].expected.sin == pytest.approx(floor, rel=1e-9)
        assert fmean(one.rounds[-1].sin for one in found) == pytest.approx(floor, rel=0.15)
        least = found[0].expected.loss
        assert least == pytest.approx(50 * noise**2)
        assert fmean(one.rounds[-1].loss_rolora for one in found) == pytest.approx(least, rel=0.03)


def test_clients_that_differ_leave_rolora_an_angle_that_the_formula_foretells() -> None:
    for samples in (100, 900):  # a third of the angle with nine times the rows
        found = [
            run(heterogeneity=0.9, samples=samples, width=8, dimension=30, rounds=100, seed=seed)
            for seed in range(6)
        ]
        ratios = [one.rounds[-1].sin / one.expected.sin for one in found]
        assert fmean(ratios) == pytest.approx(1, abs=0.15)


def test_where_clients_differ_fedavg_finds_the_direction_and_the_losses_end_alike() -> None:
    found = run(heterogeneity=0.6)
    assert found.fedit_sin[-1] < 1e-9 < 1e-4 < found.rounds[-1].sin
    last = found.rounds[-1]
    assert last.loss_rolora == pytest.approx(last.loss_fedit, rel=0.01)
    assert last.loss_rolora == pytest.approx(found.expected.loss, rel=0.1)
    assert last.loss_ffa > 2 * last.loss_rolora


def test_clients_that_differ_turn_rolora_as_the_norm_of_their_mean_does() -> None:
    setting = Setting(heterogeneity=0.9, rounds=10)
    problem = isotropic(setting)
    mean = float(problem.b_stars.mean(dim=0).norm())
    assert mean < 0.8
    found = simulate(problem)
    for before, after in pairwise(sines(found)):
        assert after == pytest.approx(population_sin(before, 0.25, mean), rel=1e-9)
    for before, after in pairwise([0.9, *found.fedit_sin]):
        assert after == pytest.approx(population_sin(before, 0.25, 1.0), rel=1e-9)
    floors = expected(problem)
    assert found.rounds[0].loss_ffa == pytest.approx(floors.loss_ffa, rel=1e-12)
    assert loss(problem, problem.a_star, problem.b_stars.mean(dim=0)) == pytest.approx(floors.loss)


def test_the_order_of_clients_is_irrelevant() -> None:
    problem = draw_problem(SMALL)
    turned = torch.tensor([2, 0, 3, 1])
    other = replace(
        problem, x=problem.x[turned], y=problem.y[turned], b_stars=problem.b_stars[turned]
    )
    for one, two in zip(simulate(problem).rounds, simulate(other).rounds, strict=True):
        assert vars(one) == pytest.approx(vars(two), rel=1e-9)


def test_a_seed_gives_the_same_bits_again_and_another_seed_others() -> None:
    first = simulate(draw_problem(SMALL))
    torch.rand(3, generator=generator(0))
    assert simulate(draw_problem(SMALL)) == first
    assert simulate(draw_problem(replace(SMALL, seed=1))).rounds != first.rounds


def test_a_client_s_rows_do_not_depend_on_how_many_others_there_are() -> None:
    few, many = (draw_problem(replace(SMALL, clients=n)) for n in (2, 7))
    assert torch.equal(few.x, many.x[:2])
    assert torch.equal(few.y, many.y[:2])
    assert not torch.equal(many.x[0], many.x[1])


def test_a_sweep_changes_one_setting_and_takes_several_seeds() -> None:
    base = Setting(rounds=3)
    for name, values in VALUES.items():
        plan = plan_sweep(base, name, seeds=2)
        assert [getattr(group[0], name) for group in plan] == list(values)
        for group in plan:
            assert [one.seed for one in group] == [0, 1]
            same = {name: getattr(base, name), "samples": base.samples, "seed": 0}
            if name == "clients":
                assert group[0].clients * group[0].samples == 1000
            assert replace(group[0], **same) == base
    with pytest.raises(ConfigError, match="did you mean 'noise'"):
        plan_sweep(base, "noize")


def test_a_row_of_a_sweep_is_the_mean_and_range_over_its_seeds() -> None:
    (group,) = (one for one in plan_sweep(Setting(), "noise", seeds=3) if one[0].noise == 0)
    row = measure("noise", group)
    found = [simulate(draw_problem(setting)) for setting in group]
    last = [one.rounds[-1].sin for one in found]
    assert (row.value, row.seeds, row.samples) == (0, (0, 1, 2), 200)
    assert row.sin.mean == pytest.approx(fmean(last))
    assert (row.sin.low, row.sin.high) == (min(last), max(last))
    assert row.sin.sd == pytest.approx(float(torch.tensor(last).double().std()))
    for until, one in zip(row.rounds_until_found, found, strict=True):
        assert until is not None
        assert one.rounds[until - 1].sin < 1e-6 <= one.rounds[until - 2].sin


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eta": 6.0}, r"not real; use at most 5\.26"),
        ({"eta": 0.0}, "eta = 0"),
        ({"eta": math.nan}, "eta = nan"),
        ({"delta0": 1.0}, "delta0 = 1"),
        ({"delta0": 0.0}, "delta0 = 0"),
        ({"rounds": 0}, "rounds = 0: must be at least 1"),
        ({"samples": 0}, "samples = 0"),
        ({"clients": 0}, "clients = 0"),
        ({"dimension": 1}, "dimension = 1: must be at least 2"),
        ({"noise": -0.1}, "noise = -0.1"),
        ({"noise": 1e200}, r"noise = 1e\+200"),
        ({"b_norm": 0.0}, "b_norm = 0"),
        ({"b_norm": 1e200}, r"b_norm = 1e\+200"),
        ({"b_norm": 1e-200}, "b_norm = 1e-200: must be 1e-30 to"),
        ({"heterogeneity": 1.0}, "heterogeneity = 1"),
        ({"heterogeneity": 0.5, "width": 1}, "width of 2"),
        ({"samples": 10**7}, "at most 268,435,456"),
    ],
)
def test_a_setting_that_cannot_be_run_says_what_is_wrong(
    changes: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(Setting(), **changes)  # type: ignore[arg-type]


def test_the_example_in_the_docstring_is_so() -> None:
    assert doctest.testmod(rolora.theory.curves) == (0, 3)


def test_verdicts_fail_where_the_claims_do(outcome: Outcome) -> None:
    assert [verdict.holds for verdict in theory_verdicts(outcome)] == [True, True, True, None]
    noisy = theory_verdicts(run(noise=0.1))
    assert [verdict.holds for verdict in noisy] == [False, True, True, None, None]
    assert "about 0.022 is expected" in noisy[0].text
    assert "factor 0.976 only up to round" in noisy[1].text
    long = theory_verdicts(run(eta=1.2, samples=5))
    assert [verdict.holds for verdict in long[:2]] == [False, False]
    assert "above the bound in 59 rounds, first in round 2" in long[1].text
    notes = " ".join(verdict.text for verdict in long[4:])
    assert all(words in notes for words in ("fewer rows", "do not determine", "large step"))


def test_the_page_has_the_numbers_of_the_command(outcome: Outcome) -> None:
    page = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()
    for line in round_cells(outcome):
        assert f"| {' | '.join(line)} |" in page
    row = measure("noise", plan_sweep(Setting(), "noise")[3])
    assert f"| {' | '.join(sweep_cells('noise', [row])[1])} |" in page


LINEAR = sorted((Path(__file__).parent.parent / "experiments" / "linear").glob("*.toml"))


def rolora_theory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    monkeypatch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["rolora", "theory", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    captured = capsys.readouterr()
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def test_json_has_the_settings_a_line_a_round_and_the_sweep_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--samples", 40, "--rounds", 5, "--seed", 3, "--b-norm", 0.5, "--sweep", "noise")
    code, out, err = rolora_theory(monkeypatch, capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert "5 rounds ..." in err
    assert "sweep over noise ..." in err
    setting = Setting(samples=40, rounds=5, seed=3, b_norm=0.5)
    assert Setting(**found["settings"]) == setting
    assert [one["round"] for one in found["rounds"]] == [1, 2, 3, 4, 5]
    keys = {"round", "sin", "bound", "loss_rolora", "loss_ffa", "loss_fedit"}
    assert all(set(one) == keys for one in found["rounds"])
    assert found["rounds"][-1]["sin"] == simulate(draw_problem(setting)).rounds[-1].sin
    assert [row["value"] for row in found["sweeps"]["noise"]] == list(VALUES["noise"])
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_gets_the_picture_and_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "linear"
    code, out, _ = rolora_theory(monkeypatch, capsys, "--rounds", 3, "--out", folder)
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["theory.json", "theory.png"]
    assert len(json.loads((folder / "theory.json").read_text())["rounds"]) == 3
    assert out.splitlines()[0].split()[:3] == ["round", "sin", "θ"]
    assert f"numbers   {folder / 'theory.json'}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--eta", "6"), "use at most 5.26"),
        (("--delta0", "1.5"), "delta0 = 1.5"),
        (("--rounds", "0"), "rounds = 0: must be at least 1"),
        (("--sweep", "client"), "did you mean 'clients'?"),
        (("--out", "x.pdf"), "must end in .png or .svg, or be a folder"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line_and_writes_nothing(
    words: tuple[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = rolora_theory(monkeypatch, capsys, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_gives_the_options_and_the_command_line_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("linear.toml").write_text("samples = 40\nrounds = 5\nnoise = 0.1\n")
    code, out, _ = rolora_theory(monkeypatch, capsys, "linear.toml", "--rounds", 3, "--json")
    assert code == 0
    assert Setting(**json.loads(out)["settings"]) == Setting(samples=40, rounds=3, noise=0.1)


def test_a_file_with_a_key_that_is_no_option_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("linear.toml").write_text("sampels = 40\n")
    code, _, err = rolora_theory(monkeypatch, capsys, "linear.toml")
    said = "rolora: linear.toml: unknown key 'sampels': did you mean 'samples'?\n"
    assert (code, err) == (2, said)


@pytest.mark.parametrize("path", LINEAR, ids=lambda path: path.name)
def test_the_linear_experiments_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rolora.theory.sweeps.VALUES", {"noise": (0.0,)})
    code, out, _ = rolora_theory(monkeypatch, capsys, path, "--rounds", 2)
    assert code == 0
    assert out.startswith("round")


def test_the_help_names_every_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = rolora_theory(monkeypatch, capsys, "--help")
    assert all(name in out for name in VALUES)


def test_a_picture_is_drawn_with_any_number_of_sweeps_and_for_flat_losses(tmp_path: Path) -> None:
    short = Setting(dimension=4, samples=8, width=3, clients=2, rounds=2)
    noisy = simulate(draw_problem(replace(short, noise=2.0)))
    row = measure("noise", [short, replace(short, seed=1)])
    for count in (0, 1, 4):
        sweeps = {name: [row, row] for name in list(VALUES)[:count]}
        save_picture(theory_figure(noisy, sweeps), tmp_path / f"{count}.svg")
        text = (tmp_path / f"{count}.svg").read_text()
        assert text.count("noise: sd") == (count > 3)
        assert "the paper's bound" in text
