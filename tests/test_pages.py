"""The code on the pages is right: commands parse, settings are valid, names and links exist."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Group
from documents import PAGES, ROOT, SHELLS, blocks, commands, every_page, lines, prose
from scripts import script
from typer.main import get_command

import rolora
from rolora.cli import main as cli
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.results.published import read_published
from rolora.sites.site_config import SiteConfig

COLUMNS = {name: name for name in ("prompt", "completion", "choices", "answer")}
BARE: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": "t.csv", "validation": 0.1},
}
LEAST = {**BARE, "data": {**BARE["data"], **COLUMNS}}
# blocks that nothing here can run; each says why on its page
NOT_RUN = {
    "docs/deploy.md": 3,
    "docs/flower.md": 3,
    "docs/quickstart.md": 1,
    "docs/scale.md": 2,
    "experiments/README.md": 2,
}


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
def test_a_block_is_of_a_language_that_is_checked_or_says_why_it_is_not_run(page: Path) -> None:
    for block in blocks(page):
        # what has no language is an output, a tree or a formula
        assert block.language in {"", "diff", "json", "python", "toml", *SHELLS}, block
        if block.language in SHELLS and block.reason is None:
            programs = {words[0] for words in lines(block)}
            assert programs <= {"rolora", "make", "cp"}, f"{page.name}: {programs}"


def test_the_blocks_that_are_not_run_are_those_counted_here() -> None:
    marked = Counter(
        page.relative_to(ROOT).as_posix()
        for page in PAGES
        for block in blocks(page)
        if block.reason is not None
    )
    assert marked == NOT_RUN


@every_page
def test_toml_on_a_page_is_valid(page: Path) -> None:
    for block in blocks(page, "toml"):
        values = tomllib.loads(block.text)
        if block.reason is not None or "project" in values:
            continue  # a package's own file: the tests of its page install it
        if "superlink" in values:
            SiteConfig.model_validate(values)
        else:
            own = {name: {**values.get(name, {}), **least} for name, least in BARE.items()}
            make_config({**values, **own})


@every_page
def test_json_on_a_page_is_a_file_of_published_numbers(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "json"):
        (tmp_path / "run.published.json").write_text(block.text)
        assert read_published(tmp_path / "run.toml") is not None


@every_page
def test_python_on_a_page_parses_and_the_names_of_rolora_in_it_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rolora":
                folder = ROOT / "src" / "rolora" / node.attr
                assert hasattr(rolora, node.attr) or folder.is_dir(), ast.unparse(node)


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


@every_page
def test_every_table_has_a_head_and_no_gap(page: Path) -> None:
    for paragraph in prose(page).split("\n\n"):
        if paragraph.lstrip("\n").startswith("|"):
            assert re.match(r"\n*\|.*\|\n\|[ :|-]+\|\n", paragraph + "\n"), paragraph[:200]


def navigation(entries: Any) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in navigation(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.relative_to(ROOT).as_posix() for page in PAGES)


def test_the_page_of_the_api_lists_every_public_name_and_no_other() -> None:
    listed = re.findall(r"^::: rolora\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(rolora.__all__)


def test_llms_txt_is_the_one_made_from_the_navigation() -> None:
    assert (ROOT / "llms.txt").read_text() == script("docs/make_llms.py").text()
