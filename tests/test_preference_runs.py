"""Claims about whole runs that learn preferences: from rows to an adapter, here and at sites."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from calls import Calls
from proposals import write_template
from test_cli import rolora
from tiny import SENTENCES, tiny_llama

from rolora.comparison.grid import plan
from rolora.comparison.queue import queued_runs
from rolora.config.load import config_hash, load_config, make_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError
from rolora.methods import method_names
from rolora.plan.needs import make_plan
from rolora.results.runs import load_run
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.experiment import Experiment
from rolora.run.prediction import predict
from rolora.sites.coordinator import across
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig
from rolora.training import local

pytestmark = pytest.mark.usefixtures("quick")

GOOD, BAD = ("good", "warm", "heart"), ("bad", "thin", "plot")
PAIRS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
KTO = {"prompt": "prompt", "completion": "completion", "label": "label"}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of which one is praise; and a completion that is praise in every other row."""
    rng, made = random.Random(seed), []
    for row in range(count):
        good, bad = (" " + " ".join(rng.choices(words, k=3)) for words in (GOOD, BAD))
        prompt = " ".join(rng.choice(SENTENCES).split()[:4])
        both = {"prompt": prompt, "chosen": good, "rejected": bad}
        made.append({**both, "completion": bad if row % 2 else good, "label": row % 2 == 0})
    return made


def write(path: Path, given: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    tiny_llama(folder / "model")
    for seed, name in enumerate(("site-a", "site-b", "test")):
        write(folder / f"{name}.jsonl", rows(24, seed))
    return folder


def configuration(place: Path, *overrides: str, loss: str = "dpo") -> RunConfig:
    given: dict[str, Any] = {
        "name": "preferences",
        "server_seed": 0,
        "model": {"path": "model", "task": "preference", "dtype": "fp32"},
        "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": "site-*.jsonl", "test": "test.jsonl", "max_length": 48},
        "preference": {"loss": loss},
        "partition": {"scheme": "files"},
        "train": {"rounds": 4, "batch_size": 4, "lr": 0.02, "bank": 1, "cache": ""},
        "eval": {"every": 2},
        "federation": {"sites": 2, "wait": 5},
    }
    given["data"] |= KTO if loss == "kto" else PAIRS
    return make_config(given, overrides, root=place)


def measured(config: RunConfig, out: Path, *build: Any) -> list[dict[str, float]]:
    results = [result.metrics for result in runs.start(config, out, *build).rounds()]
    return [dict(metrics) for metrics in results if metrics]


@pytest.mark.parametrize("name", method_names())
def test_a_run_of_every_method_learns_what_is_preferred(
    place: Path, tmp_path: Path, name: str
) -> None:
    rate = 0.2 if name == "ravan" else 0.02  # it trains small cores only
    changes = (f"method.name={name}", f"train.lr={rate}", "eval.every=4")
    first, *_, last = measured(configuration(place, *changes), tmp_path / "run")
    assert first["accuracy"] == 0.5
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["accuracy"] > 0.6
    assert last["margin"] > 0 == pytest.approx(first["margin"], abs=1e-5)
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("loss", ["ipo", "kto"])
def test_a_run_of_every_loss_learns_what_is_preferred(
    place: Path, tmp_path: Path, loss: str
) -> None:
    first, *_, last = measured(
        configuration(place, "train.rounds=6", "preference.beta=0.5", loss=loss), tmp_path / "run"
    )
    assert first["accuracy"] == 0.5
    assert last["accuracy"] > 0.7
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_sites_that_agree_to_the_columns_end_with_the_metrics_of_one_machine(
    place: Path, tmp_path: Path, loss: str
) -> None:
    config = configuration(place, "data.client_test=0.25", loss=loss)
    here = measured(config, tmp_path / "here")
    consent = KTO if loss == "kto" else PAIRS
    there = measured(config, tmp_path / "there", across(sites(place, tmp_path, **consent), print))
    assert there == here
    assert len(here) > 2


def sites(place: Path, state: Path, **consent: str) -> Calls:
    made = {}
    for node, name in enumerate(("site-a", "site-b")):
        made[node] = Site(
            SiteConfig(
                name=name,
                data=f"{name}.jsonl",
                state=str(state / name),
                root=place,
                tasks=["preference"],
                min_train_rows=1,
                min_score_rows=1,
                **consent,
            )
        )
    return Calls(made)


@pytest.mark.parametrize("role", list(PAIRS))
def test_a_site_refuses_a_column_that_its_operator_has_not_named(
    place: Path, tmp_path: Path, role: str
) -> None:
    named = {key: value for key, value in PAIRS.items() if key != role}
    transport = sites(place, tmp_path, **named)
    config = configuration(place, "federation.wait=0.1")
    with pytest.raises(Exception, match="sites"):
        runs.start(config, tmp_path / "run", across(transport, print))
    assert all(reply.head.get("error") == "role" for _, _, reply in transport.passed)


def test_sites_have_no_warm_start_to_compare_with(place: Path, tmp_path: Path) -> None:
    config = configuration(place, "lora.init_from=warm")
    with pytest.raises(ConfigError, match="sites do not have the adapter of lora"):
        runs.start(config, tmp_path / "run", across(sites(place, tmp_path, **PAIRS), print))


def test_a_kto_row_is_beside_another_of_its_own_client(place: Path, tmp_path: Path) -> None:
    experiment = Experiment(configuration(place, "data.client_test=0.25", loss="kto"), tmp_path)
    table = experiment.rows.train.to_pylist()
    for held in (experiment.rows.shards, experiment.rows.held_out):
        for own in held.values():
            mine = [table[row] for row in own.tolist()]
            before = [mine[-1], *mine[:-1]]
            found = [row["completion of the row before"] for row in mine]
            assert found == [row["completion"] for row in before]


def test_a_row_is_run_once_without_an_adapter_in_a_whole_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = list[int]()
    real = local.outputs_of

    def counted(base: Any, task: Any, examples: Any, batches: Any) -> Any:
        if not base.bank.leaves:
            plain.append(len(examples))
        return real(base, task, examples, batches)

    monkeypatch.setattr("rolora.training.reference.outputs_of", counted)
    config = configuration(place, "data.validation=0.25", "data.client_test=0.25")
    list(runs.start(config, tmp_path / "run").rounds())
    assert len(plain) == 5  # training, test and validation rows, and those of two clients
    assert sum(plain) == 48 + 24 + 12 + held_out(config, tmp_path)


def test_other_seeds_other_methods_and_a_resumed_run_read_what_the_first_run_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = list[int]()
    real = local.outputs_of

    def counted(base: Any, task: Any, examples: Any, batches: Any) -> Any:
        passes.append(len(examples))
        return real(base, task, examples, batches)

    monkeypatch.setattr("rolora.training.reference.outputs_of", counted)
    many = tmp_path / "many.jsonl"
    write(many, rows(80, 7))
    split = (f"data.train={many}", "partition.scheme=iid", "partition.clients=2", "train.rounds=1")
    config = configuration(place, *split, f"train.cache={tmp_path / 'cache'}")
    list(runs.start(config, tmp_path / "first").rounds())
    assert sorted(passes) == [24, 80]
    for number, change in enumerate(("seed=1", "method.name=fedit", "lora.rank=3")):
        other = configuration(place, *split, f"train.cache={tmp_path / 'cache'}", change)
        list(runs.start(other, tmp_path / str(number)).rounds())
    code, _, _ = rolora(monkeypatch, capsys, "resume", tmp_path / "first", "--rounds", 2)
    assert code == 0
    assert passes.count(80) == 1


def test_showing_what_is_trained_on_runs_no_row_through_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any) -> Any:
        raise AssertionError("rows went through the model")

    monkeypatch.setattr("rolora.training.reference.outputs_of", none)
    shown = runs.training_masks(Experiment(configuration(place)), 2)
    assert all(any(trained for _, trained in pieces) for row in shown for pieces in row.values())


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_row_is_shown_with_each_completion_that_is_trained_on(place: Path, loss: str) -> None:
    """A pair's two; of a row that is judged alone its own, not that of the row before."""
    experiment = Experiment(configuration(place, loss=loss))
    shown, table = runs.training_masks(experiment, 2), experiment.rows.train
    names = ["chosen", "rejected"] if loss == "dpo" else ["completion"]
    learned = [
        ["".join(text for text, trained in pieces if trained) for pieces in row.values()]
        for row in shown
    ]
    wanted = [[table[name][row].as_py() for name in names] for row in range(2)]
    for texts, ends in zip(learned, wanted, strict=True):
        for text, end in zip(texts, ends, strict=True):
            assert end.split() == text.replace("<|im_end|>", "").split()


def test_timing_steps_for_the_dtype_takes_no_pass_before_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = list[float]()

    def lower(base: Any, task: Any, examples: Any, *given: Any) -> str:
        timed.append(float(examples.reference.abs().max()))
        return "it is timed"

    def none(*given: Any) -> Any:
        raise AssertionError("a pass")

    monkeypatch.setattr("rolora.run.experiment.is_wide", lambda base: True)
    monkeypatch.setattr("rolora.run.experiment.lower", lower)
    monkeypatch.setattr("rolora.training.reference.outputs_of", none)
    experiment = Experiment(configuration(place, "model.dtype=auto"), tmp_path)
    assert experiment.base is not None
    assert timed == [0.0]


def held_out(config: RunConfig, folder: Path) -> int:
    return sum(map(len, Experiment(config, folder).rows.held_out.values()))


def test_a_resumed_run_ends_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    config = configuration(place)
    list(runs.start(config, tmp_path / "whole").rounds())
    parts = runs.start(config, tmp_path / "parts").rounds()
    for _ in range(3):
        next(parts)
    parts.close()
    list(runs.resume(tmp_path / "parts").rounds())
    one, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert one == other


def test_predicted_margins_are_those_of_peft_and_those_that_are_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(runs.start(configuration(place), tmp_path / "run").rounds())
    test = place / "test.jsonl"
    found = predict(tmp_path / "run", str(test))
    metrics = evaluate_adapter(tmp_path / "run", str(test))
    margins = [row["margin"] for row in found]
    assert metrics["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-6)
    assert metrics["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert load_run(tmp_path / "run").rounds[-1]["metrics"] == pytest.approx(metrics, rel=1e-5)

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()

    def log_probability(prompt: str, completion: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
        each = model(ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])
        return float(each[start - 1 :].sum())

    for row, one in zip(rows(24, 2)[:4], found, strict=False):
        for key in ("chosen", "rejected"):
            with torch.inference_mode():
                after = log_probability(row["prompt"], row[key])
                with model.disable_adapter():
                    before = log_probability(row["prompt"], row[key])
            assert one[f"{key}_reward"] == pytest.approx(0.1 * (after - before), abs=1e-4)

    words = ("predict", tmp_path / "run", "--data", test, "--out", tmp_path / "found.csv")
    assert rolora(monkeypatch, capsys, *words)[0] == 0
    with (tmp_path / "found.csv").open(newline="") as file:
        printed = [float(row["margin"]) for row in csv.DictReader(file)]
    assert printed == pytest.approx(margins, rel=1e-6)


def test_a_warm_start_is_what_rewards_are_measured_from(place: Path, tmp_path: Path) -> None:
    list(runs.start(configuration(place), tmp_path / "warm").rounds())
    warm = tmp_path / "warm" / "adapter"
    first, *_, last = measured(configuration(place, f"lora.init_from={warm}"), tmp_path / "run")
    assert first["accuracy"] == 0.5
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    found = evaluate_adapter(tmp_path / "run", str(place / "test.jsonl"))
    assert found == pytest.approx(last, rel=1e-5)
    list(runs.start(configuration(place, "seed=1"), tmp_path / "other").rounds())
    with pytest.raises(ConfigError, match="is not the adapter that"):
        evaluate_adapter(
            tmp_path / "run",
            str(place / "test.jsonl"),
            overrides=[f"lora.init_from={tmp_path / 'other' / 'adapter'}"],
        )


def test_runs_of_a_comparison_share_rows_only_where_they_are_the_same(
    place: Path, tmp_path: Path
) -> None:
    for loss, shared in (("dpo", True), ("kto", False)):
        split = ("partition.scheme=iid", "partition.clients=2", "train.rounds=1")
        config = configuration(place, *split, loss=loss)
        comparison = plan(config, {"rolora": (), "fedit": ()}, seeds=[0, 1])
        seen = list[Experiment]()
        for queued in queued_runs(comparison, tmp_path / loss):
            list(queued.run.rounds())
            seen.append(queued.run.experiment)
        assert len({id(one.base) for one in seen}) == 1
        assert (len({id(one.examples) for one in seen}) == 1) == shared
        for one in seen:
            alone = Experiment(one.config, tmp_path, base=one.base)
            assert alone.data == one.data


def test_a_run_is_planned_with_its_rows_and_without(place: Path) -> None:
    elsewhere = ("data.train=gone.jsonl", "partition.scheme=iid")
    for loss in ("dpo", "kto"):
        here = make_plan(Experiment(configuration(place, loss=loss)))
        gone = make_plan(Experiment(configuration(place, *elsewhere, loss=loss)))
        for found in (here, gone):
            assert all(round.flops for round in found.methods[0].rounds)


def test_a_run_of_another_task_is_the_run_that_it_was_before_there_were_preferences(
    site: Path, place: Path
) -> None:
    plain = load_config(site)
    assert config_hash(plain) == config_hash(load_config(site, ["preference.beta=0.5"]))
    assert config_hash(plain) == "1c3e9b6afc9d61d392d3157c650690fa"  # as of 40d73eb
    pairs = configuration(place)
    for changed in ("preference.beta=0.5", "data.chosen=prompt"):
        assert config_hash(pairs) != config_hash(configuration(place, changed))


def test_init_proposes_a_run_that_starts(place: Path, tmp_path: Path) -> None:
    for columns, loss in ((PAIRS, "dpo"), (KTO, "kto")):
        folder = tmp_path / loss
        folder.mkdir()
        write(folder / "rows.jsonl", [{key: row[key] for key in columns} for row in rows(40, 0)])
        write_template(str(folder / "rows.jsonl"), folder / "made.toml", str(place / "model"))
        small = ("partition.clients=2", "train.rounds=1", "lora.target_modules=['q_proj']")
        config = load_config(folder / "made.toml", [*small, "data.max_length=48"])
        assert (config.model.task, config.preference.loss) == ("preference", loss)
        assert {key: getattr(config.data, key) for key in columns} == columns
        assert measured(config, folder / "run")[-1].keys() == {"accuracy", "margin", "loss"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("preference.loss=kto",), "with data.chosen and data.rejected, use 'dpo'"),
        (("preference.beta=0",), "preference.beta"),
        (("preference.label_smoothing=0.5",), "preference.label_smoothing"),
        (("preference.loss=ipo", "preference.label_smoothing=0.1"), "is for loss 'dpo'"),
        (("preference.loss=simpo",), "preference.loss"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    place: Path, tmp_path: Path, changes: tuple[str, ...], said: str
) -> None:
    with pytest.raises(Exception, match=said) as caught:
        runs.start(configuration(place, *changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="use 'kto'"):
        configuration(place, "preference.loss=dpo", loss="kto")


def test_what_workers_compare_with_has_the_bits_of_the_threads_that_a_resumed_run_has(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    real = local.outputs_of

    def counted(*given: Any) -> list[torch.Tensor]:
        threads.append(torch.get_num_threads())
        return [one + threads[-1] for one in real(*given)]

    monkeypatch.setattr("rolora.training.reference.outputs_of", counted)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = configuration(place, "train.workers=2", "train.bank=1", "data.validation=0.2")
        run = runs.start(config, tmp_path / "run")
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        again = runs.resume(tmp_path / "run")
    finally:
        torch.set_num_threads(before)
    for name in ("examples", "test", "validation"):
        one, other = (getattr(each.experiment, name).reference for each in (run, again))
        assert torch.equal(one, other), name
    engine: Any = run.experiment.federation.engine
    assert engine.here.examples is run.experiment.examples
    assert set(threads) == {1, 2}
