"""Every odd or bad input of ``tests/corpus`` ends with its exit code and its one line.

``corpus/cases.toml`` is the table: the command, its exit code, and how its message begins. Commands
are given in a copy of ``corpus`` that also has a tiny model, rows and ``run.toml``. A case can have
``on = "run"`` or ``"adapter"``: a good one then lies in ``it``, ``without`` some of its files and
with those of the folder ``put`` instead. Time and memory are in the record of each case.
"""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_cli import rolora
from tiny import tiny_llama
from tiny_site import make_site

from rolora.config.load import load_config, make_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, DataError
from rolora.results.runs import load_run
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter

pytestmark = pytest.mark.usefixtures("quick")

CORPUS = Path(__file__).parent / "corpus"
CASES = tomllib.loads((CORPUS / "cases.toml").read_text())["case"]
MEMORY = 512  # MB that a case may take
CHAT = """\
[model]
path = "chat-model"
task = "causal_lm"
[lora]
target_modules = ["q_proj"]
[data]
train = "rows.jsonl"
messages = "messages"
[partition]
clients = 2
[train]
rounds = 1
local_steps = 1
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with a model, a chat model, and a finished run in ``whole``."""
    place = tmp_path_factory.mktemp("corpus") / "place"
    shutil.copytree(CORPUS, place)
    tiny_llama(place / "chat-model")
    (place / "chat.toml").write_text(CHAT)
    list(runs.start(load_config(make_site(place), ["train.rounds=1"]), place / "whole").rounds())
    return place


@pytest.fixture
def laid(ground: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Lays out a case's ``it`` in the corpus, where commands are then given."""
    monkeypatch.chdir(ground)
    for name in ("it", "out"):
        shutil.rmtree(name, ignore_errors=True)
    Path("out.toml").unlink(missing_ok=True)

    def lay(case: dict[str, Any]) -> None:
        if "on" in case:
            adapter = case["on"] == "adapter"
            shutil.copytree("whole/adapter" if adapter else "whole", "it")
            if adapter:
                notes = Path("it/rolora.json")
                notes.write_text(notes.read_text().replace('"root": "../.."', '"root": ".."'))
        for name in case.get("without", []):
            path = Path("it") / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if "put" in case:
            shutil.copytree(case["put"], "it", dirs_exist_ok=True)

    return lay


def test_the_corpus_is_as_large_as_it_is_meant_to_be() -> None:
    assert len(CASES) >= 150
    assert len({case["name"] for case in CASES}) == len(CASES)
    used = " ".join(f"{case['run']} {case.get('put', '')}" for case in CASES)
    files = [file for file in CORPUS.rglob("*") if file.is_file() and file.name != "cases.toml"]
    for file in files:
        part = file.relative_to(CORPUS)
        known = str(part.parent) if part.parts[0] in ("runs", "adapters") else file.name
        assert known in used, part


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_an_odd_input_ends_with_its_code_and_its_line(
    case: dict[str, Any],
    ground: Path,
    laid: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    laid(case)
    began, before = time.perf_counter(), _peak()
    code, _, err = rolora(monkeypatch, capsys, *shlex.split(case["run"]))
    grown = _peak() - before
    record_property("seconds", round(time.perf_counter() - began, 3))
    record_property("megabytes", grown)
    assert code == case["code"], err
    assert "Traceback" not in err
    assert grown < MEMORY
    said = [line for line in err.splitlines() if line.startswith("rolora: ")]
    if code:
        assert case["says"] in err.replace(f"{ground}/", "")
        assert len(said) == 1 or "Usage:" in err
    else:
        assert not said


def _refused(error: Exception) -> None:
    assert str(error)


def _peak() -> int:
    """The most memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


LEAST = {"model": {"path": "model"}, "data": {"train": "rows.csv"}}
KEYS = st.sampled_from(
    [
        *("", "seed", "name", "lora.rank", "data.test", "train.lr", "method.name", "eval.answer"),
        *("train", "aggregate.reducer", "aggregate.options.clip.norm", "model.path.x", "a..b"),
        "root",
    ]
)
VALUES = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "[1, 2]", "[]", '{"*" = 2}', "{}", '""', "1979-05-27", "'''", '"\\u0000"']
    ),
    st.lists(st.integers()).map(str),
)


@given(st.lists(st.one_of(st.text(max_size=30), st.tuples(KEYS, VALUES).map("=".join)), max_size=3))
@example(["seed=" + "[" * 5000])
@example(["name=1\nseed=2"])
def test_any_override_gives_a_configuration_or_one_config_error(overrides: list[str]) -> None:
    try:
        assert isinstance(make_config(dict(LEAST), overrides), RunConfig)
    except ConfigError as error:
        _refused(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["config", "root", "labels", "base", "model", "r", "path", "peft_type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
ANYTHING = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.sampled_from(["rolora.json", "adapter_model.safetensors", "adapter_config.json"]), ANYTHING
)
def test_an_adapter_folder_with_any_bytes_in_it_is_one_error_or_is_read(
    ground: Path, laid: Callable[[dict[str, Any]], None], name: str, content: bytes
) -> None:
    shutil.rmtree("it", ignore_errors=True)
    laid({"on": "adapter"})
    (Path("it") / name).write_bytes(content)
    try:
        assert evaluate_adapter("it", "data/test.csv").keys() >= {"accuracy", "loss"}
    except (ConfigError, DataError) as error:
        _refused(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.toml", "rounds.jsonl", "partition.json", "axes.json"]), ANYTHING)
def test_a_run_folder_with_any_bytes_in_it_is_one_error_or_is_read(
    ground: Path, laid: Callable[[dict[str, Any]], None], name: str, content: bytes
) -> None:
    shutil.rmtree("it", ignore_errors=True)
    laid({"on": "run", "without": ["checkpoints", "adapter"]})
    (Path("it") / name).write_bytes(content)
    try:
        assert load_run("it").rounds is not None
    except (ConfigError, DataError) as error:
        _refused(error)
