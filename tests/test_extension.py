"""A package outside the repository adds a method, reducers and a task, which a run uses by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.methods import get_method, method_names
from rolora.results.runs import load_run, primary_metric
from rolora.run import runs
from rolora.tasks.registry import higher_is_better

pytestmark = pytest.mark.usefixtures("quick", "package")

ENTRY_POINTS = """\
[rolora.methods]
ffa_but_a = outside.methods:only_a
[rolora.reducers]
nearest = outside.reducers:nearest
halved = outside.reducers:halved
positional = outside.reducers:positional
hoarder = outside.reducers:hoarder
absent = outside.reducers:absent
[rolora.tasks]
error_rate = outside.tasks:error_rate
nameless = outside.tasks:nameless
"""
METHODS = '''\
"""Only A: train and average lora_A (arXiv:2403.12313 the other way round)."""

from rolora import Method


def only_a(*, head: bool = True) -> Method:
    moving = frozenset({"A", "head"} if head else {"A"})
    return Method(
        name="ffa_but_a", trainable=lambda round, step: moving, shared=lambda round: moving
    )
'''
REDUCERS = '''\
"""Rules of this package."""

from rolora import Reducer


def nearest() -> Reducer:
    """The update nearest to where the round started."""

    def add(memory, value, reference, weight):
        far = sum(float((value[n] - reference[n]).square().sum()) for n in value)
        best = min([far, value], memory.get("best", [far, value]), key=lambda one: one[0])
        return {"best": best}

    return Reducer(dict, add, lambda memory, rng: (memory["best"][1], {}))


def halved(inner: Reducer, *, share: float = 0.5) -> Reducer:
    """Each update goes only a share of its way."""

    def add(memory, value, reference, weight):
        part = {n: reference[n] + share * (t - reference[n]) for n, t in value.items()}
        return inner.add(memory, part, reference, weight)

    return Reducer(inner.init, add, inner.finish)


def positional(factor: float = 1.0) -> Reducer:
    """Its option is not keyword-only."""


def hoarder() -> Reducer:
    """Keeps what no checkpoint can hold."""

    def add(memory, value, reference, weight):
        return {"value": value}

    return Reducer(dict, add, lambda memory, rng: (memory["value"], {"bound": 1.5}))
'''
TASKS = '''\
"""Tasks of this package."""

from dataclasses import replace

from rolora.tasks.registry import task_kind


def error_rate():
    """Classification, measured by the share of wrong answers."""
    kind = task_kind("classification")

    def make(base, columns, labels, max_length):
        return replace(kind.make(base, columns, labels, max_length), score=score)

    return replace(kind, name="error_rate", metrics={"error_rate": False}, make=make)


def score(outputs, examples):
    wrong = outputs.argmax(dim=1) != examples.targets
    return {"error_rate": float(wrong.float().mean())}


def nameless():
    """Classification under its own name."""
    return task_kind("classification")
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> object:
    """An installed package: its modules, and the metadata that names its entry points."""
    place = tmp_path_factory.mktemp("site-packages")
    for file, text in {
        "outside/__init__.py": "",
        "outside/methods.py": METHODS,
        "outside/reducers.py": REDUCERS,
        "outside/tasks.py": TASKS,
        "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        "outside-1.0.dist-info/entry_points.txt": ENTRY_POINTS,
    }.items():
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        yield


def test_a_run_uses_a_method_and_reducers_of_an_installed_package_by_name(
    site: Path, tmp_path: Path
) -> None:
    changes = [
        "train.rounds=1",
        "method.name=ffa_but_a",
        "method.head=false",
        'aggregate.reducer=["halved", "nearest"]',
        "aggregate.options.halved.share=0.25",
        "aggregate.clip_norm=100.0",
    ]
    config = load_config(site, changes)
    names = [name for name, _ in config.aggregate.rules]
    assert names == ["clip", "halved", "nearest"]
    (_, result) = runs.start(config, tmp_path / "run").rounds()
    assert result.advanced
    assert result.factors == ("A",)
    (line,) = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[1:]
    assert json.loads(line)["factors"] == ["A"]


def test_a_task_of_an_installed_package_is_trained_measured_and_reported(
    site: Path, tmp_path: Path
) -> None:
    config = load_config(site, ["model.task=error_rate", "train.rounds=1"])
    *_, result = runs.start(config, tmp_path / "run").rounds()
    assert set(result.metrics) == {"error_rate"}
    assert primary_metric([load_run(tmp_path / "run")]) == "error_rate"
    assert not higher_is_better("error_rate")


def test_a_reducer_that_keeps_what_no_checkpoint_can_hold_is_an_error(
    site: Path, tmp_path: Path
) -> None:
    config = load_config(site, ["aggregate.reducer=hoarder", "train.rounds=1"])
    with pytest.raises(TypeError, match="keeps 'bound', which is not a tensor"):
        list(runs.start(config, tmp_path / "run").rounds())


def test_names_of_other_packages_stand_beside_ours() -> None:
    assert {"ffa_but_a", "rolora"} <= set(method_names())
    assert get_method("ffa_but_a").trained(1) == {"A", "head"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.name=ffa_but_b", "unknown method 'ffa_but_b': did you mean 'ffa_but_a'?"),
        ("method.haed=false", "unknown key 'method.haed': did you mean 'method.head'?"),
        ("method.head=1", "method.head: Input should be a valid boolean, got 1"),
        ("aggregate.reducer=nearst", "unknown reducer 'nearst': did you mean 'nearest'?"),
        ("aggregate.reducer=positional", "option 'factor' must be keyword-only: put * before it"),
        ("aggregate.reducer=absent", "reducer 'absent': outside.reducers:absent does not load"),
        ("model.task=nameless", "task 'nameless' calls itself 'classification'"),
        ('aggregate.reducer=["nearest", "mean"]', "reducer 'nearest' wraps no other: put it last"),
        ('aggregate.reducer=["mean", "halved"]', "reducer 'mean' wraps no other: put it last"),
        ("aggregate.reducer=halved", "reducer 'halved' wraps another one: add a rule"),
        ('aggregate.reducer=["halved","halved","mean"]', "reducer 'halved' is given twice"),
        ('aggregate.reducer=["clip", "mean"]', "aggregate.options.clip.norm is missing"),
        ("aggregate.options.halved.share=0.5", "[aggregate.options.halved] is for a reducer that"),
        ("aggregate.options.mean.dtpye=float32", "did you mean 'aggregate.options.mean.dtype'?"),
        ("aggregate.options.mean.dtype=float16", "Input should be 'float64' or 'float32'"),
    ],
)
def test_a_wrong_name_option_or_place_is_one_line_that_says_what_to_do(
    override: str, said: str, site: Path
) -> None:
    method = [] if "method.name" in override else ["method.name=ffa_but_a"]
    with pytest.raises(ConfigError) as caught:
        load_config(site, [*method, override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_package_cannot_replace_what_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "greedy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rolora.methods]\nrolora = outside.methods:only_a\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="only_a adds a method 'rolora', but"):
        get_method("rolora")
