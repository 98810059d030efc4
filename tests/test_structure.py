"""The shape of the code, read off its syntax: levels, fences, sizes, names, public interface."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rolora

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rolora"
FILES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}
every_module = pytest.mark.parametrize("module", FILES)

# A module imports from its own row or from one above it. A package named with ".*" means its files,
# but for those that are named themselves.
LEVELS = (
    ("errors", "draws", "durable", "endpoint", "schedule", "low_rank", "adapter", "reduce", "wire"),
    ("method", "factoring", "products", "schema", "tasks", "tasks.examples", "theory", "theory.*"),
    ("fetch", "fetch.*", "model", "model.*", "comparison.variants"),
    ("methods", "methods.*", "step", "traffic", "catalogue", "data", "data.*"),
    ("report", "report.*", "comparison.tuning"),
    ("tasks.*", "local", "memory", "gradient", "starter", "store"),
    ("engine", "precision"),
    ("rounds",),
    ("config", "configured", "record"),
    ("federation", "plan", "plan.*"),
    ("build",),
    ("runs", "evaluation"),
    ("comparison", "comparison.*", "harness", "cli.display"),
    ("flower", "flower.*", "demo"),
    ("cli", "cli.*"),
    ("cli.main", "__main__", "__init__"),
)

# Which modules may import which library; the standard library and rolora itself are free.
FENCES: dict[str, set[str]] = {
    "torch": {"*"},
    "transformers": {
        "model.checkpoint",
        "model.lora",
        "plan.outline",
        "model.packing",
        "model.pixel_network",
        "model.stack",
        "tasks.generation",
    },
    "peft": {"model.lora"},
    "datasets": {"data.hub"},
    "pyarrow": {"data.tables", "data.hub", "data.shards", "data.columns"},
    "safetensors": {"model.prefix", "model.lora", "model.pixel_network", "store", "record", "wire"},
    "sklearn": {"tasks.classification"},
    "scipy": {"report.paired"},
    "flwr": {
        "flower.apps",
        "flower.carrier",
        "flower.fleet",
        "flower.node",
        "flower.plain_server",
        "flower.superlink",
    },
    "cryptography": {"flower.fleet", "flower.keys"},
    "httpx": {"flower.fleet", "flower.node"},
    "uvicorn": {"flower.superlink"},
    "pydantic": {"config", "schema", "flower.site_config", "comparison.tuning", "report.published"},
    "tomli_w": {"config", "report.page", "flower.folder", "flower.rehearsal"},
    "typer": {
        "cli.main",
        "cli.compare",
        "cli.demo",
        "cli.evaluate",
        "cli.plan",
        "cli.sites",
        "cli.theory",
    },
    "rich": {"cli.printing", "cli.display", "cli.compare_table"},
    "matplotlib": {"report.figures", "report.svg", "report.forest", "report.theory_figure"},
    "jinja2": {"report.page"},
    "lm_eval": {"harness"},
    "evaluate": {"harness"},
}
TORCH_ALONE = (
    "adapter",
    "draws",
    "errors",
    "factoring",
    "low_rank",
    "reduce",
    "products",
    "data.partition",
    "method",
    "step",
    "traffic",
    "theory.linear_model",
    "theory.curves",
    "theory.sweeps",
)
# gguf is for transformers, which imports it when it reads such a file; accelerate is for lm_eval
INDIRECT = {"gguf", "accelerate"}

FORBIDDEN = {"util", "utils", "helper", "helpers", "manager", "common", "misc", "stuff", "core"}
PUBLIC = [
    "AdapterState",
    "ClientInfo",
    "Method",
    "Reducer",
    "RoloraError",
    "RoundResult",
    "RunConfig",
    "ServerState",
    "Update",
    "compare",
    "evaluate_adapter",
    "federate",
    "get_method",
    "load_config",
    "make_config",
    "method_names",
    "resume",
    "start",
    "write_report",
]


def imported(module: str) -> Iterator[str]:
    """Dotted names of the modules that a module imports anywhere, functions included."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                inside = whole.removeprefix("rolora.") in FILES
                yield whole if inside else str(node.module)


def siblings(module: str) -> set[str]:
    """The modules of rolora that a module imports."""
    own = (name for name in imported(module) if name.partition(".")[0] == "rolora")
    return {name.partition(".")[2] or "__init__" for name in own} - {module}


def level(module: str) -> int:
    """The row of LEVELS that names the module, by itself before by its package."""
    for name in (module, f"{module.rpartition('.')[0]}.*"):
        for row, names in enumerate(LEVELS):
            if name in names:
                return row
    raise AssertionError(f"module {module} has no level: add it to LEVELS")


def fresh(code: str) -> str:
    """What the code prints in a new interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def loaded_by(code: str, libraries: set[str]) -> list[str]:
    """Which of these libraries the code loads."""
    return fresh(f"import sys\n{code}\nprint(*sorted({libraries} & sys.modules.keys()))").split()


@every_module
def test_imports_go_to_a_lower_level_or_stay_within_one(module: str) -> None:
    own = level(module)
    assert not {other for other in siblings(module) if level(other) > own}


def test_imports_have_no_cycle() -> None:
    list(TopologicalSorter({module: siblings(module) for module in FILES}).static_order())


def test_every_level_names_modules_that_exist() -> None:
    packages = {f"{module.rpartition('.')[0]}.*" for module in FILES if "." in module}
    assert {name for names in LEVELS for name in names} <= set(FILES) | packages | {"__init__"}


@every_module
def test_a_library_is_imported_only_inside_its_fence(module: str) -> None:
    for library in {name.partition(".")[0] for name in imported(module)} - {"rolora"}:
        if library in sys.stdlib_module_names:
            continue
        assert library in FENCES, f"{module} imports {library}, which has no fence"
        assert FENCES[library] & {module, "*"}, f"{module} imports {library}"


@pytest.mark.parametrize("library", sorted(FENCES.keys() - {"torch"}))
def test_a_fence_is_no_wider_than_its_library_needs(library: str) -> None:
    users = {m for m in FILES if library in {name.partition(".")[0] for name in imported(m)}}
    assert users == FENCES[library]


def test_the_dependencies_are_the_libraries_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["flower"] + extras["harness"]
    names = {text.partition(">=")[0].replace("-", "_") for text in declared}
    used = {"scikit_learn" if library == "sklearn" else library for library in FENCES}
    assert names == used | INDIRECT


def test_the_algorithms_need_torch_alone() -> None:
    names = [*TORCH_ALONE, *(f"methods.{name}" for name in rolora.method_names())]
    code = "\n".join(f"import rolora.{name}" for name in names)
    assert loaded_by(code, set(FENCES)) == ["torch"]


@pytest.mark.parametrize("module", ["rolora", "rolora.cli.main", "rolora.errors"])
def test_importing_the_package_or_its_command_loads_no_heavy_library(module: str) -> None:
    assert loaded_by(f"import {module}", FENCES.keys() - {"typer", "rich"}) == []


@every_module
def test_a_module_has_at_most_300_lines(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 300


@every_module
def test_a_function_has_at_most_60_lines_beside_its_docstring(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            text = (ast.get_docstring(node, clean=False) or "").count("\n") + 1
            assert (node.end_lineno or 0) - first + 1 - text <= 60, f"{module}.{node.name}"


@every_module
def test_no_module_has_a_name_that_says_nothing(module: str) -> None:
    assert not {word for part in module.split(".") for word in part.split("_")} & FORBIDDEN


@every_module
def test_every_public_name_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(TREES[module]) or module == "__init__"

    def check(body: list[ast.stmt], where: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            # torch's own names say what they do; a method's file has the docstring of its method
            known = node.name in {"forward", "backward"} and where != module
            if not known and not (where.startswith("methods.") and node.name == "method"):
                assert ast.get_docstring(node), f"{where}.{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                check(node.body, f"{where}.{node.name}")

    check(TREES[module].body, module)


@every_module
def test_nothing_that_runs_code_from_a_file_or_a_hub_is_used(module: str) -> None:
    dangerous = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name.partition(".")[0] for name in imported(module)} & dangerous
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"torch.load", "torch.save", "os.system"}
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {alias.name for alias in node.names} & {"load", "save"}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"eval", "exec", "compile", "__import__"}
            for keyword in node.keywords:
                if keyword.arg in {"trust_remote_code", "shell"}:
                    assert ast.unparse(keyword.value) == "False"
                assert keyword.arg != "weights_only" or ast.unparse(keyword.value) == "True"


def test_no_random_draw_comes_from_a_global_generator() -> None:
    seeding = {"torch.manual_seed", "random.seed", "np.random", "numpy.random"}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in seeding, module
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "bernoulli")
            }:
                assert "generator" in {keyword.arg for keyword in node.keywords}, module


def test_the_public_names_are_these() -> None:
    assert rolora.__all__ == PUBLIC


def test_no_public_name_is_also_a_module_s_which_would_hide_it_once_imported() -> None:
    assert not set(rolora.__all__) & FILES.keys()


def test_every_public_name_is_what_its_home_defines() -> None:
    for name in PUBLIC:
        assert getattr(rolora, name).__module__.startswith("rolora.")
        assert getattr(rolora, name).__name__ == name
        assert getattr(rolora, name).__doc__


def test_type_checkers_see_the_same_public_names() -> None:
    (block,) = (node for node in TREES["__init__"].body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = [
        alias.asname
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert seen == [
        alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(map(str, seen)) == PUBLIC


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'stat'"):
        rolora.stat  # noqa: B018
