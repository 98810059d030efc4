"""The documents say what is so: their code runs, and their tables are those of the program."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch
from documents import PAGES, ROOT, blocks, section
from scripts import script
from tiny_site import write_rows

from rolora.algorithm.choices import Format
from rolora.algorithm.codec import encode
from rolora.methods import method_names
from rolora.plan.method_table import describe_methods


def runnable(page: Path) -> list[str]:
    """The Python of a page that is not marked as needing what is not here."""
    return [block.text for block in blocks(page, "python") if block.reason is None]


def call(*words: str, **environment: str) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_site_builds_with_every_link_checked_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module, reason="mkdocs is in the extra docs")
    call("mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path))
    pages = {file.relative_to(tmp_path).as_posix(): file for file in tmp_path.rglob("*.html")}
    assert {"index.html", "docs/quickstart.html", "CONTRIBUTING.html"} <= pages.keys()
    for file in pages.values():
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*(?:src|href)=\"?(http[^\s>]*)", file.read_text()
        )
        assert loaded == [], file
    assert "rolora.attach" in pages["docs/api.html"].read_text()


def test_the_page_of_the_configuration_is_the_one_written_from_the_schema() -> None:
    page = script("docs/make_configuration.py").page()
    assert (ROOT / "docs" / "configuration.md").read_text() == page


def test_the_table_of_the_page_on_uploads_is_the_one_made_from_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "wire.json").read_text())
    table = script("benchmarks/wire_accuracy.py").table(record)
    assert table in (ROOT / "docs" / "wire.md").read_text()


def test_the_payloads_on_the_page_on_uploads_are_as_long_as_it_says() -> None:
    layers = [f"base_model.model.bert.encoder.layer.{i}.attention.self." for i in range(6)]
    names = [f"{layer}{which}.lora_B.weight" for layer in layers for which in ("query", "value")]
    like = {name: torch.zeros(384, 4) for name in names}
    like |= {"base_model.model.classifier.weight": torch.zeros(6, 384)}
    like |= {"base_model.model.classifier.bias": torch.zeros(6)}
    assert sum(tensor.numel() for tensor in like.values()) == 20_742
    page = (ROOT / "docs" / "wire.md").read_text()
    said = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", page, re.MULTILINE))
    assert said == {f: f"{len(encode(f, like, like, {})[0]):,}" for f in get_args(Format)}


def test_every_file_that_the_tree_of_contributing_names_exists() -> None:
    parent, found = ROOT, 0
    for text in section(ROOT / "CONTRIBUTING.md", "The tree").splitlines():
        indent, names = text.startswith("  "), re.findall(r"[\w/]+(?:\.py|/)(?=\s|$)", text)
        if not indent:
            parent = ROOT
        for name in names:
            assert (parent / name).exists(), name
            found += 1
        if not indent and names == ["src/rolora/"]:
            parent = ROOT / "src" / "rolora"
    assert found > 20


def test_the_readme_lists_every_method_and_no_other() -> None:
    rows = re.findall(r"^\| .* \| (.*) \|$", section(ROOT / "README.md", "Methods"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == method_names()


def test_the_table_of_the_page_on_methods_is_the_one_read_off_the_methods() -> None:
    page = ROOT / "docs" / "methods.md"
    assert script("docs/make_methods.py").page(page.read_text()) == page.read_text()


def test_the_tables_of_the_page_of_results_are_those_of_the_records() -> None:
    made, page = script("docs/make_results.py"), (ROOT / "docs" / "results.md").read_text()
    assert made.page(page, made.read_records()) == page


def test_the_table_of_the_page_on_choosing_is_that_of_the_records() -> None:
    made, page = script("docs/make_results.py"), (ROOT / "docs" / "choosing.md").read_text()
    assert made.choosing(page, made.read_records()) == page


def test_the_pictures_of_the_page_on_concepts_are_those_of_their_script() -> None:
    made = script("docs/make_concepts.py")
    for draw, file in made.PICTURES.items():
        assert file.read_bytes() == made.picture(draw), file.name


def test_the_tables_of_the_page_on_robustness_are_those_of_the_records() -> None:
    made, page = script("docs/make_robustness.py"), (ROOT / "docs" / "robustness.md").read_text()
    assert made.page(page, made.read_records()) == page


@pytest.mark.parametrize("name", method_names())
def test_a_method_has_a_section_with_its_paper_its_rule_and_each_option_and_default(
    name: str,
) -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    assert text.count(f"\n### {name}\n") == 1
    its = re.split(r"\n##", text.partition(f"\n### {name}\n")[2])[0]
    (row,) = (row for row in describe_methods() if row.name == name)
    assert f"](https://arxiv.org/abs/{row.paper.removeprefix('arXiv:')})" in its
    assert len(re.findall(r"^```\n.+?^```$", its, re.DOTALL | re.MULTILINE)) == 1
    said = dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|left out) \|", its, re.MULTILINE))
    options = dict(option.split("=") for option in row.options)
    toml = {"None": "", "True": "true", "False": "false"}
    assert said == {k: toml.get(v, v.replace("'", '"')) for k, v in options.items()}
    assert ("No options." in its) == (not options)


@pytest.mark.slow
def test_the_plan_on_its_page_is_the_one_that_the_command_prints() -> None:
    assert (ROOT / "docs" / "plan.md").read_text() == script("docs/make_plan.py").page()


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_readme_run_in_their_order(here: Path) -> None:
    shells = (block.text for block in blocks(ROOT / "README.md", "bash", "sh"))
    (shell,) = (text for text in shells if "rolora init" in text)
    for text in shell.splitlines():
        program, *words = shlex.split(text, comments=True)
        assert program == "rolora"
        call("rolora", *words)
    assert {path.name for path in (here / "runs").iterdir()} == {
        "mydata",
        "mydata-compare",
    }
    left = section(ROOT / "docs" / "quickstart.md", "What a run leaves")
    for name in re.findall(r"^  (\S+)", left, re.MULTILINE):
        assert (here / "runs" / "mydata" / name).exists(), name
    call("rolora", "resume", "runs/mydata")


@pytest.mark.slow
def test_the_commands_of_the_quickstart_run_in_their_order(here: Path) -> None:
    (here / "data" / "trec").mkdir()
    for name in ("train", "test"):
        write_rows(here / "data" / "trec" / f"{name}.csv", 60)
    made = script("docs/make_quickstart.py")
    page = made.page((ROOT / "docs" / "quickstart.md").read_text(), here)
    assert "aggregation error" in page
    assert (here / "runs" / "questions" / "adapter" / "adapter_model.safetensors").exists()
    assert len((here / "predicted.csv").read_text().splitlines()) == 61
    assert (here / "merged" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    # the code of these two is a method's file and a Flower project, which tests of their own run
    [
        page
        for page in PAGES
        if runnable(page) and page.name not in ("CONTRIBUTING.md", "flower.md")
    ],
    ids=lambda page: page.name,
)
def test_the_python_of_a_page_runs(page: Path, here: Path) -> None:
    call("rolora", "init", "mydata.csv", "--model", "data/minilm")
    names: dict[str, object] = {}
    for text in runnable(page):
        exec(compile(text, page.name, "exec"), names)
    assert list((here / "runs").glob("*/report.html"))


@pytest.mark.slow
def test_the_example_of_contributing_is_a_method_by_being_dropped_in(tmp_path: Path) -> None:
    example = blocks(ROOT / "CONTRIBUTING.md", "python")[0].text
    shutil.copytree(ROOT / "src", tmp_path / "src")
    (tmp_path / "src" / "rolora" / "methods" / "example.py").write_text(example)
    source = str(tmp_path / "src")
    table = call("rolora", "methods", "--json", PYTHONPATH=source)
    assert '"name": "example"' in table
    assert '"paper": "arXiv:2403.12313"' in table
    suite = str(ROOT / "tests" / "test_methods.py")
    options = ("-k", "example", "-p", "no:cacheprovider", "-p", "no:xdist")
    told = call("pytest", suite, *options, f"--rootdir={ROOT}", PYTHONPATH=source)
    assert int(re.findall(r"(\d+) passed", told)[0]) > 15


@pytest.mark.slow
def test_the_reducer_and_the_task_of_contributing_are_used_by_name(here: Path) -> None:
    """Both come from a package beside rolora, with the entry points that the page shows."""
    page = ROOT / "CONTRIBUTING.md"
    _, *files = blocks(page, "python")
    for block in files:
        file = here / block.text.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(block.text)
    info = here / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    groups = [
        tomllib.loads(block.text)["project"]["entry-points"] for block in blocks(page, "toml")
    ]
    lines = [
        f"[{group}]\n{name} = {where}\n"
        for points in groups
        for group, own in points.items()
        for name, where in own.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(here), str(ROOT / "src")])
    call("rolora", "init", "mydata.csv", "--model", "data/minilm", PYTHONPATH=path)
    chosen = ("model.task=error_rate", "aggregate.reducer=midrange")
    short = ("train.rounds=1", "partition.clients=3")
    call("rolora", "run", "rolora.toml", *chosen, *short, PYTHONPATH=path)
    last = (here / "runs" / "mydata" / "rounds.jsonl").read_text().splitlines()[-1]
    assert 0 <= json.loads(last)["metrics"]["error_rate"] <= 1


def test_the_sections_of_the_page_on_reliability_are_those_of_the_records() -> None:
    module = script("docs/make_reliability.py")
    text = module.PAGE.read_text()
    assert text == module.page(text, module.records())
