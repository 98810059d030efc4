"""The documents say what is so: their code runs, their commands parse, their links lead on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click import Group
from scripts import script
from tiny import tiny_bert
from tiny_site import write_rows
from typer.main import get_command

from rolora.algorithm.codec import Format, encode
from rolora.cli import main as cli
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.methods import method_names
from rolora.plan.method_table import describe_methods

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
COLUMNS = {name: name for name in ("prompt", "completion", "choices", "answer")}
LEAST = {"model": {"path": "m"}, "data": {"train": "t.csv", "validation": 0.1, **COLUMNS}}


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every shell command: lines of shell blocks, and code in the text.

    A command that the text only names, without an argument, is asked for its help.
    """
    for block in blocks(page, "sh", "bash", "shell", "console"):
        for text in block.replace("\\\n", " ").splitlines():
            yield shlex.split(text.removeprefix("$ "), comments=True)
    for text in re.findall(r"`((?:rolora|make) [^`]+)`", prose(page)):
        words = shlex.split(text)
        yield words if len(words) > 2 or words[0] == "make" else [*words, "--help"]


def section(page: Path, title: str) -> str:
    """The text under a heading."""
    return page.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def overrides(parsed: dict[str, Any]) -> list[list[str]]:
    """What a parsed command sets, without the method that compare may set it for, and with each
    value of its grids."""
    pairs = list(parsed.get("overrides") or [])
    grids = [grid.partition("=") for grid in parsed.get("tune") or []]
    tuned = [f"{key}={value}" for key, _, values in grids for value in values.split(",")]
    return [
        [pair.partition(":")[2] if ":" in pair.partition("=")[0] else pair for pair in each]
        for each in (pairs, *([*pairs, one] for one in tuned))
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place with a model and rows under the names that the documents use."""
    tiny_bert(tmp_path / "models" / "minilm")
    write_rows(tmp_path / "mydata.csv", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


@every_page
def test_every_command_line_parses(page: Path) -> None:
    tree = get_command(cli.app)
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[:1] == ["rolora"] and not words[1].startswith("-"):
            command, rest = tree, words[1:]
            while isinstance(command, Group):
                command, rest = command.commands[rest[0]], rest[1:]
            if rest == ["--help"]:  # it is there
                continue
            parsed = command.make_context(words[1], [word for word in rest if word != "..."])
            for each in overrides(parsed.params):
                make_config(LEAST, each)
        elif words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets


def test_a_command_that_does_not_parse_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for wrong in (
        "rolora rum x",
        "rolora run --ouy x",
        "rolora run x train.rouds=3",
        "rolora federation kees",
        "rolora compare x --tune train.rl=1,2",
        "make al",
    ):
        page.write_text(f"```sh\n{wrong}   # as it is\n```\n")
        with pytest.raises(Exception, match=r"rum|ouy|rouds|kees|rl|al") as found:
            test_every_command_line_parses(page)
        assert not isinstance(found.value, FileNotFoundError)


@every_page
def test_every_key_in_the_text_is_a_key_of_the_configuration(page: Path) -> None:
    for name, key in re.findall(r"`([a-z]+)\.([a-z_]+)(?= = |=|`)", prose(page)):
        if name in RunConfig.model_fields and key not in {"py", "md", "toml", "csv"}:
            assert name == "method" or key in RunConfig.model_fields[name].annotation.model_fields  # type: ignore[union-attr]


@every_page
def test_every_link_and_picture_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name} links to {link}"


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


def test_every_file_that_the_tree_of_the_readme_names_exists() -> None:
    parent, found = ROOT, 0
    for text in section(ROOT / "README.md", "The tree").splitlines():
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
def test_the_commands_and_the_python_of_the_readme_run_in_their_order(folder: Path) -> None:
    (shell,) = (text for text in blocks(ROOT / "README.md", "bash", "sh") if "rolora init" in text)
    for text in shell.splitlines():
        program, *words = shlex.split(text, comments=True)
        assert program == "rolora"
        call("rolora", *words)
    assert {path.name for path in (folder / "runs").iterdir()} == {"mydata", "mydata-compare"}
    left = section(ROOT / "README.md", "What a run leaves")
    for name in re.findall(r"^  (\S+)", left, re.MULTILINE):
        assert (folder / "runs" / "mydata" / name).exists(), name
    call("rolora", "resume", "runs/mydata")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    # the code of these is a method's file and a Flower project, which tests of their own run, and
    # what needs a cluster
    [
        page
        for page in PAGES
        if blocks(page, "python") and page.name not in ("CONTRIBUTING.md", "flower.md", "scale.md")
    ],
    ids=lambda page: page.name,
)
def test_the_python_of_a_page_runs(page: Path, folder: Path) -> None:
    call("rolora", "init", "mydata.csv", "--model", "models/minilm")
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    assert list((folder / "runs").glob("*/report.html"))


@pytest.mark.slow
def test_the_example_of_contributing_is_a_method_by_being_dropped_in(tmp_path: Path) -> None:
    example, *_ = blocks(ROOT / "CONTRIBUTING.md", "python")
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
def test_the_reducer_and_the_task_of_contributing_are_used_by_name(folder: Path) -> None:
    """Both come from a package beside rolora, with the entry points that the page shows."""
    page = ROOT / "CONTRIBUTING.md"
    _, *files = blocks(page, "python")
    for text in files:
        file = folder / text.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    groups = [tomllib.loads(text)["project"]["entry-points"] for text in blocks(page, "toml")]
    lines = [
        f"[{group}]\n{name} = {where}\n"
        for points in groups
        for group, own in points.items()
        for name, where in own.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    call("rolora", "init", "mydata.csv", "--model", "models/minilm", PYTHONPATH=path)
    chosen = ("model.task=error_rate", "aggregate.reducer=midrange")
    short = ("train.rounds=1", "partition.clients=3")
    call("rolora", "run", "rolora.toml", *chosen, *short, PYTHONPATH=path)
    last = (folder / "runs" / "mydata" / "rounds.jsonl").read_text().splitlines()[-1]
    assert 0 <= json.loads(last)["metrics"]["error_rate"] <= 1


def test_the_sections_of_the_page_on_reliability_are_those_of_the_records() -> None:
    module = script("docs/make_reliability.py")
    text = module.PAGE.read_text()
    assert text == module.page(text, module.records())
