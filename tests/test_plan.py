"""Claims about the plan of a run: what it says beforehand is what the run then takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import architectures
import pytest
import torch
from allocation import allocated
from safetensors.torch import load_file
from tiny import tiny_bert, tiny_llama
from tiny_clients import Bench, classifier, language_model
from tiny_site import make_site, values
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rolora.algorithm.adapter import Assignment, ClientInfo, Roles, role_of
from rolora.cli import main as cli
from rolora.config.load import load_config, make_config
from rolora.config.schema import RunConfig
from rolora.data.examples import Batch, collate
from rolora.demo.side_by_side import prepare_demo
from rolora.errors import ConfigError
from rolora.methods import method_names
from rolora.model.bank import row_keys
from rolora.model.peft import LoraSettings
from rolora.plan import estimate, needs
from rolora.plan.cost import StepCost, step_cost
from rolora.plan.meta_model import outline
from rolora.plan.needs import Plan
from rolora.run import runs
from rolora.run.experiment import Experiment
from rolora.training.client_store import KEPT_STATES
from rolora.training.engine import Job, group_size

pytestmark = pytest.mark.usefixtures("quick")

A, B, BOTH = (frozenset(roles) for roles in ({"A", "head"}, {"B"}, {"A", "B"}))
DEMO = Path(__file__).parent.parent / "demo"
SIZES = (3, 4, 1)
PARTS = ("checkpoints/*", "adapter")
MAKERS = {"bert": (tiny_bert, classifier), "llama": (tiny_llama, language_model)}


def make_plan(config: RunConfig, methods: Sequence[str] = ()) -> Plan:
    return needs.make_plan(Experiment(config), methods)


def step(bench: Bench, batch: Batch, roles: Roles, dropout: bool) -> None:
    """The forward and backward pass that is planned, on real numbers."""
    base, bank = bench.base, bench.base.bank
    bank.load([bench.start()] * len(SIZES))
    try:
        for name, leaf in bank.leaves.items():
            leaf.requires_grad_(role_of(name) in roles)
        keys = row_keys([0] * len(SIZES), 0, SIZES) if dropout else None
        with base.running(batch, SIZES, keys) as given:
            bench.task.loss(base.model, given)[0].sum().backward()  # type: ignore[no-untyped-call]
    finally:
        bank.unload()


@pytest.mark.parametrize("roles", [A, B, BOTH], ids=lambda roles: "+".join(sorted(roles)))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_takes_the_memory_and_the_products_that_were_counted_on_shapes(
    tmp_path: Path, name: str, dropout: float, roles: Roles
) -> None:
    save, make = MAKERS[name]
    folder = save(tmp_path / "model")
    bench: Bench = make(folder, torch.float32, dropout=dropout)
    batch = collate(bench.examples, torch.arange(sum(SIZES)), bench.base.tokenizer.pad_token_id)
    drawn = outline(
        str(folder),
        "classification" if name == "bert" else "causal_lm",
        LoraSettings(rank=2, dropout=dropout),
        labels=["bad", "good", "odd"],
    )
    planned = step_cost(drawn, bench.task, batch, SIZES, bench.start(), roles)
    step(bench, batch, roles, dropout > 0)  # what is allocated once only
    leaves = len(SIZES) * bench.start().num_bytes()
    peak = allocated(lambda: step(bench, batch, roles, dropout > 0)) - leaves
    assert planned.peak == pytest.approx(peak, rel=0.15)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        step(bench, batch, roles, dropout > 0)
    assert planned.flops == pytest.approx(counted.get_total_flops(), rel=0.15)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture
def bare(site: Path) -> Path:
    """The same place with no weights in the model's folder: a plan must not need them."""
    (site.parent / "model" / "model.safetensors").unlink()
    return site


def payload(folder: Path, pattern: str) -> int:
    """Bytes of the tensors in these files."""
    tensors = (tensor for file in folder.glob(pattern) for tensor in load_file(file).values())
    return sum(tensor.nbytes for tensor in tensors)


# personal parts, no uploads at all, sparse uploads, cores
ENCODED = ("rolora", "fedsa_lora", "centralized", "lora_a2", "ravan")


@pytest.mark.parametrize(
    ("method", "up"),
    [(name, "fp32") for name in method_names()] + [(name, "int8") for name in ENCODED],
)
def test_what_travels_and_what_is_kept_are_planned_to_the_byte(
    site: Path, tmp_path: Path, method: str, up: str
) -> None:
    # whether anything is left beyond a smaller energy is up to the training
    energy = ["method.energy=1.0"] if method == "fedmomentum" else []
    config = load_config(
        site, [f"method.name={method}", f"wire.up={up}", "train.rounds=7", *energy]
    )
    (planned,) = make_plan(config).methods
    run = runs.start(config, tmp_path / "run")
    results = list(run.rounds())
    assert planned.counted
    # which pieces a sparse upload holds is up to the training
    near = {"rel": 0.1} if run.experiment.federation.method.sparse_upload else {"rel": 0, "abs": 0}
    assert planned.up == pytest.approx(sum(result.bytes_up for result in results), **near)
    assert planned.down == pytest.approx(sum(result.bytes_down for result in results), **near)
    start = run.experiment.start.server.adapter
    assert sum(planned.parameters.values()) == sum(t.numel() for t in start.values())
    assert planned.bank == (
        run.experiment.bank if run.experiment.federation.method.federated else 1
    )
    saved = [payload(run.folder.path, f"{part}/*.safetensors") for part in PARTS]
    assert planned.checkpoints == sum(saved)
    kept = payload(run.folder.path, "clients/*/*.safetensors")
    assert (kept > 0) == (planned.personal > 0)
    assert kept <= planned.personal


@pytest.mark.parametrize("changes", [["method.turn=1.0"], ["train.keep_moments=true"]])
def test_turns_that_travel_and_moments_that_are_kept_are_planned_to_the_byte(
    site: Path, tmp_path: Path, changes: list[str]
) -> None:
    config = load_config(site, ["train.rounds=7", "train.participation=1.0", *changes])
    (planned,) = make_plan(config).methods
    assert [plan.factors for plan in planned.rounds] == ["B", "A"]
    run = runs.start(config, tmp_path / "run")
    results = list(run.rounds())
    assert planned.up == sum(result.bytes_up for result in results)
    assert planned.down == sum(result.bytes_down for result in results)
    steps = 4 * len(run.experiment.start.server.adapter)  # a count of steps for each tensor
    clients = len(run.experiment.rows.shards)
    kept = payload(run.folder.path, "clients/*/*.safetensors")
    counted = 0 if changes[0].startswith("method") else clients * KEPT_STATES * steps
    assert kept == planned.personal + counted


@pytest.mark.parametrize(
    "rule", [["aggregate.byzantine=2"], ["aggregate.reducer=fltrust", "aggregate.trusted=client-3"]]
)
def test_a_run_whose_rule_needs_many_clients_or_a_trusted_one_is_planned_as_any_other(
    bare: Path, rule: list[str]
) -> None:
    overrides = ["train.participation=1.0", "partition.scheme=iid", "partition.clients=8"]
    plain, planned = (make_plan(load_config(bare, [*overrides, *more])) for more in ([], rule))
    assert planned.methods[0].up == plain.methods[0].up
    assert planned.methods[0].down == plain.methods[0].down


def test_a_plan_without_the_weights_is_the_plan_with_them(site: Path) -> None:
    config = load_config(site)
    whole = make_plan(config)
    weights = site.parent / "model" / "model.safetensors"
    assert whole.stored == weights.stat().st_size
    weights.unlink()
    assert make_plan(config) == dataclasses.replace(whole, stored=whole.parameters * 4)
    with pytest.raises(ConfigError, match="cannot load model"):  # what would load it now fails
        Experiment(config).load_base()


def test_a_run_whose_rows_are_away_is_planned_at_its_worst_and_says_so(bare: Path) -> None:
    here = make_plan(load_config(bare))
    overrides = ["data.train=nyu-mll/glue:sst2", "data.test=0.1", "offline=true"]
    away = make_plan(load_config(bare, overrides))
    assert (here.rows, away.rows) == (60, None)
    assert away.clients == here.clients == 5
    assert away.tokens == 4 * 32 > here.tokens
    said = " ".join(away.notes)
    assert "nyu-mll/glue:sst2 is not on this machine: 5 clients are assumed" in said
    assert "every row is assumed to have 32 tokens" in said
    assert "2 labels are assumed" in said
    tables = values(bare.parent)
    del tables["train"]["local_steps"]
    epochs = make_config(tables, [*overrides, "train.local_epochs=2"], root=bare.parent)
    unknown = make_plan(epochs)
    assert (unknown.steps, unknown.methods[0].flops) == (None, None)


def test_a_rolora_plan_has_both_kinds_of_rounds_and_half_of_fedit_s_traffic(bare: Path) -> None:
    config = load_config(bare, ["model.head=freeze", "train.participation=1.0"])
    rolora, fedit, ffa = make_plan(config, ["rolora", "fedit", "ffa_lora"]).methods
    assert [each.factors for each in rolora.rounds] == ["B", "A"]
    assert [each.factors for each in ffa.rounds] == ["B"]
    (both,) = fedit.rounds
    assert sum(each.up for each in rolora.rounds) == both.up == both.down
    assert ffa.rounds[0].up == rolora.rounds[0].up
    assert rolora.rounds[0].activations < rolora.rounds[1].activations  # type: ignore[operator]


def test_roberta_large_sends_what_the_paper_s_setting_sends(tmp_path: Path) -> None:
    tables = {
        "offline": True,
        "model": {"path": "roberta-large", "head": "freeze", "dtype": "fp32"},
        "lora": {"rank": 4, "target_modules": ["query", "value"]},
        "data": {"train": "nyu-mll/glue:sst2", "max_length": 8},
        "partition": {"clients": 3},
        "train": {"batch_size": 1},
    }
    made = make_plan(make_config(tables, root=tmp_path), ["fedit", "rolora", "ffa_lora"])
    assert made.parameters == 355_361_794
    assert made.source == "rolora/plan/shapes"
    sent = [[each.up for each in method.rounds] for method in made.methods]
    assert sent == [[1_572_864], [786_432, 786_432], [786_432]]
    assert made.weights == pytest.approx(4 * made.parameters, rel=0.01)


def test_llama_2_7b_is_counted_without_being_here(tmp_path: Path) -> None:
    drawn = outline("meta-llama/Llama-2-7b-hf", "causal_lm", LoraSettings(rank=8), offline=True)
    assert sum(p.numel() for p in drawn.base.model.parameters()) == 6_738_415_616
    assert drawn.stored_bytes == 2 * 6_738_415_616
    layers = [spec for spec in drawn.base.specs.tensors if spec.role == "A"]
    assert len(layers) == 2 * 32
    assert {spec.shape for spec in layers} == {(8, 4096)}


def test_a_model_that_is_nowhere_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^model 'nobody/nothing' is not on this machine, and offline = true"
    ) as caught:
        outline("nobody/nothing", "causal_lm", LoraSettings(), offline=True)
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_carry_adapters_is_refused_as_by_a_run(tmp_path: Path) -> None:
    folder = architectures.save("deberta-v2", "classification", tmp_path / "model")
    with pytest.raises(ConfigError, match="so it cannot carry per-client adapters"):
        outline(str(folder), "classification", LoraSettings())


def test_frozen_layers_below_the_adapters_cost_a_step_nothing_but_disk(bare: Path) -> None:
    top = ["lora.layers=top:1", "train.participation=1.0", "train.rounds=40"]
    without = make_plan(load_config(bare, [*top, "train.cache="]))
    cached = make_plan(load_config(bare, top))
    assert without.cache == 0
    assert cached.cache is not None
    assert cached.cache > 0
    for with_cache, plain in zip(cached.methods[0].rounds, without.methods[0].rounds, strict=True):
        assert with_cache.flops < 0.8 * plain.flops  # type: ignore[operator]


def test_recomputing_is_planned_to_keep_less(bare: Path) -> None:
    plain, again = (
        make_plan(load_config(bare, [f"train.recompute={value}"])).methods[0].rounds[0]
        for value in ("false", "true")
    )
    assert again.activations < 0.7 * plain.activations  # type: ignore[operator]
    assert again.flops > plain.flops  # type: ignore[operator]


def test_a_model_that_looks_at_values_is_planned_but_for_its_steps(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> StepCost:
        raise RuntimeError("data dependent")

    monkeypatch.setattr(estimate, "step_cost", refuse)
    made = make_plan(load_config(bare))
    (method,) = made.methods
    assert [(each.flops, each.peak) for each in method.rounds] == [(None, None)] * 2
    assert method.up > 0
    assert "cannot be run on shapes alone" in made.notes[-1]


def test_the_command_prints_the_same_numbers_for_people_and_for_programs(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["rolora", "plan", str(bare), *words])
        with pytest.raises(SystemExit) as ended:
            cli.app()
        assert not ended.value.code
        return capsys.readouterr().out

    words = ("model.head=freeze", "--methods", "rolora,fedit")
    made = json.loads(printed(*words, "--json"))
    rolora, fedit = made["methods"]
    assert [each["factors"] for each in rolora["rounds"]] == ["B", "A"]
    text = printed(*words)
    sends = next(row for row in text.splitlines() if row.startswith("one client sends"))
    assert sends.split("  ")[-1].strip() == f"{fedit['rounds'][0]['up'] / 1000:.3g} kB"
    assert f"{made['clients']} with 60 rows" in text
    assert text.endswith("time is not estimated: rolora run shows the time left after each round\n")


def test_the_optimiser_s_state_stands_beside_a_step_from_the_second_step_on(
    site: Path, tmp_path: Path
) -> None:
    planned, taken = [], []
    for steps in (1, 2):
        config = load_config(site, [f"train.local_steps={steps}", "lora.rank=32"])
        plan, _ = make_plan(config).methods[0].rounds
        setup = runs.start(config, tmp_path / str(steps)).experiment
        clients = islice(setup.federation.engine.clients(), 3)
        start = setup.start.server.adapter
        cohort = tuple(Assignment(ClientInfo(id, 9, 32, 1), start) for id in clients)
        job = Job(setup.start.server, cohort, 0, 1e-2)
        updates = setup.federation.engine.run(setup.federation.method, job)
        planned.append(plan.peak or 0)
        taken.append(allocated(partial(list, updates)))
    assert planned[1] - planned[0] == plan.optimizer
    assert taken[1] - taken[0] == pytest.approx(plan.optimizer, rel=0.25)


def test_rows_in_one_place_are_planned_with_the_state_that_the_second_of_a_cohort_s_steps_finds(
    site: Path,
) -> None:
    plans = [
        make_plan(load_config(site, ["method.name=centralized", f"train.local_steps={steps}"]))
        for steps in (1, 2)
    ]
    assert plans[0].methods[0].rounds[0].peak == plans[1].methods[0].rounds[0].peak


@pytest.mark.parametrize(("device", "width"), [("mps", 4), ("cuda", 2)])
def test_auto_is_planned_in_the_dtype_that_a_run_on_that_device_takes(
    device: str, width: int, site: Path
) -> None:
    made = make_plan(load_config(site, [f"device={device}", "model.dtype=auto"]))
    assert made.weights == pytest.approx(width * made.parameters, rel=0.05)


@pytest.mark.slow
def test_the_demo_takes_the_memory_that_is_planned_for_it(tmp_path: Path) -> None:
    file = prepare_demo(DEMO).file  # fetched once
    config = load_config(file, ["model.dtype=fp32", "train.rounds=2"])
    made = make_plan(config)
    run = runs.start(config, tmp_path / "run")
    setup = run.experiment
    assert made.parameters == sum(p.numel() for p in setup.base.model.parameters())
    assert made.methods[0].bank == group_size(20, setup.bank)
    engine, method = setup.federation.engine, setup.federation.method
    for round, planned in enumerate(made.methods[0].rounds, start=1):
        server = dataclasses.replace(setup.start.server, round=round - 1)
        cohort = tuple(
            Assignment(ClientInfo(id, n, 4, round), server.adapter)
            for id, n in sorted(engine.clients().items())
        )
        updates = engine.run(method, Job(server, cohort, 0, 1e-2))
        peak = allocated(partial(list, updates))
        assert planned.peak is not None
        assert planned.peak - made.weights == pytest.approx(peak, rel=0.15)
