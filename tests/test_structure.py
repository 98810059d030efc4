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

# Folders (and files) of rolora from the bottom up: each imports from lines below its own alone, so
# no two import each other.
LEVELS = (
    {"errors"},
    {"files", "network", "registry"},
    {"algorithm"},
    {"methods", "theory", "attacks"},
    {"data"},
    {"model"},
    {"tasks"},
    {"config", "training"},
    {"results"},
    {"report"},
    {"run"},
    {"comparison", "plan", "flower", "proposal"},
    {"sites", "demo"},
    {"cli"},
)

# Which folders may import which library; the standard library and rolora itself are free.
FENCES: dict[str, set[str]] = {
    "torch": {"*"},
    "transformers": {"model", "tasks", "plan"},
    "accelerate": {"model"},
    "peft": {"model"},
    "huggingface_hub": {"model"},
    "gguf": {"model"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "safetensors": {"algorithm", "model", "training", "run"},
    "sklearn": {"tasks"},
    "scipy": {"results", "tasks"},
    "psutil": {"training", "sites"},
    "yaml": {"proposal"},
    "flwr": {"flower", "sites"},
    "cryptography": {"sites"},
    "filelock": {"files"},
    "lazy_loader": {"", "flower"},
    "httpx": {"network", "sites", "flower"},
    "uvicorn": {"sites"},
    "pydantic": {"config", "results", "sites"},
    "pydantic_core": {"files"},
    "tomli_w": {"config", "report", "sites"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
}
TORCH_ALONE = ("algorithm", "methods", "theory", "attacks")
# click is typer's, and its version matters
INDIRECT = {"click"}

FORBIDDEN = {"util", "utils", "helper", "helpers", "manager", "common", "misc", "stuff", "core"}


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


def folder_of(module: str) -> str:
    """The folder, or the file directly under rolora, that a module belongs to."""
    return module.partition(".")[0].removeprefix("__init__")


def imported_folders(module: str) -> set[str]:
    """The other folders of rolora that a module imports from."""
    own = (name for name in imported(module) if name.partition(".")[0] == "rolora")
    return {folder_of(name.partition(".")[2]) for name in own} - {folder_of(module), ""}


def graph() -> dict[str, set[str]]:
    """folder -> the folders that it imports."""
    found: dict[str, set[str]] = {}
    for module in FILES.keys() - {"__init__", "__main__"}:  # the doors: they import anything
        found.setdefault(folder_of(module), set()).update(imported_folders(module))
    return found


def fresh(code: str) -> str:
    """What the code prints in a new interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def loaded_by(code: str, libraries: set[str]) -> list[str]:
    """Which of these libraries the code loads."""
    return fresh(f"import sys\n{code}\nprint(*sorted({libraries} & sys.modules.keys()))").split()


def test_folders_import_downward_only() -> None:
    level = {folder: row for row, folders in enumerate(LEVELS) for folder in folders}
    assert set(level) == set(graph()), "LEVELS names every folder, and no other"
    for folder, others in sorted(graph().items(), key=lambda item: level[item[0]]):
        print(f"{level[folder]:2}  {folder:10} {' '.join(sorted(others))}")
        assert not {other for other in others if level[other] >= level[folder]}, folder


def test_no_modules_import_each_other_in_a_circle() -> None:
    own = {module: {name.partition(".")[2] for name in imported(module)} for module in FILES}
    TopologicalSorter({module: names & FILES.keys() for module, names in own.items()}).prepare()


def test_a_library_is_imported_inside_its_fence_which_is_no_wider_than_needed() -> None:
    users: dict[str, set[str]] = {}
    for module in FILES:
        for library in {name.partition(".")[0] for name in imported(module)} - {"rolora"}:
            if library not in sys.stdlib_module_names:
                users.setdefault(library, set()).add(folder_of(module))
    assert {**users, "torch": {"*"}} == FENCES


def test_the_dependencies_are_the_libraries_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["flower"]
    names = {text.partition(">=")[0].replace("-", "_") for text in declared}
    package = {"sklearn": "scikit_learn", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    used = {package.get(library, library) for library in FENCES}
    assert names == used | INDIRECT


def test_the_algorithms_need_torch_alone() -> None:
    names = [module for module in FILES if folder_of(module) in TORCH_ALONE]
    code = "\n".join(f"import rolora.{name}" for name in names)
    assert loaded_by(code, set(FENCES)) == ["lazy_loader", "safetensors", "torch"]


@pytest.mark.parametrize("module", ["rolora", "rolora.cli.main", "rolora.errors"])
def test_importing_the_package_or_its_command_loads_no_heavy_library(module: str) -> None:
    assert loaded_by(f"import {module}", FENCES.keys() - {"typer", "rich", "lazy_loader"}) == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    words = {word for module in FILES for part in module.split(".") for word in part.split("_")}
    assert not words & FORBIDDEN


def documented(body: list[ast.stmt], where: str) -> None:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        # torch's own names say what they do; a method's file has the docstring of its method
        known = node.name in {"forward", "backward"} and where not in FILES
        if not known and not (where.startswith("methods.") and node.name == "method"):
            assert ast.get_docstring(node), f"{where}.{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            documented(node.body, f"{where}.{node.name}")


def test_every_public_name_has_a_docstring() -> None:
    for module, tree in TREES.items():
        assert ast.get_docstring(tree) or module == "__init__", module
        documented(tree.body, module)


def test_nothing_that_runs_code_from_a_file_or_a_hub_is_used() -> None:
    dangerous = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for module, tree in TREES.items():
        assert not {name.partition(".")[0] for name in imported(module)} & dangerous, module
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"torch.load", "torch.save", "os.system"}, module
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {alias.name for alias in node.names} & {"load", "save"}, module
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__"}, module
                for keyword in node.keywords:
                    if keyword.arg in {"trust_remote_code", "shell"}:
                        assert ast.unparse(keyword.value) == "False", module
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


def test_no_public_name_is_also_a_module_s_which_would_hide_it_once_imported() -> None:
    assert not set(rolora.__all__) & FILES.keys()


def test_every_public_name_is_what_its_home_defines() -> None:
    for name in rolora.__all__:
        assert getattr(rolora, name).__module__.startswith("rolora.")
        assert getattr(rolora, name).__name__ == name
        assert getattr(rolora, name).__doc__


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="stat"):
        rolora.stat  # type: ignore[attr-defined]  # noqa: B018


def test_no_generator_that_may_be_left_half_way_catches_errors_around_a_yield() -> None:
    """When Python ends, the names after ``except`` may be gone before the generator is closed."""
    found = {
        f"{module}.{function.name}"
        for module, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and not function.decorator_list
        for caught in ast.walk(function)
        if isinstance(caught, ast.Try) and caught.handlers
        for inside in caught.body
        if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(inside))
    }
    # the doctor's findings are always taken to the end
    assert {name for name in found if not name.startswith("sites.doctor.")} == set()
