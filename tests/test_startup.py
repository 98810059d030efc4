"""Claims about what a command loads before it answers: torch alone takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from synthetic_runs import write_run
from test_structure import fresh

HEAVY = {"torch", "transformers", "peft", "scipy", "sklearn", "datasets", "pyarrow"}
CONFIG = """\
[model]
path = "model"
[data]
train = "rows.csv"
"""
RUN = """
import contextlib, io, json, sys
from rolora.cli.main import main
ended = {}
for words in %r:
    sys.argv = ["rolora", *words]
    code = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as end:
        code = end.code or 0
    ended[" ".join(words)] = [code, sorted(%r & sys.modules.keys())]
print(json.dumps(ended))
"""


def ended(commands: list[list[str]]) -> dict[str, tuple[int, list[str]]]:
    """Exit code of each command, and what of HEAVY is loaded by then, all in one new process."""
    found = json.loads(fresh(RUN % (commands, HEAVY)))
    return {command: (code, loaded) for command, (code, loaded) in found.items()}


def test_a_mistake_in_a_configuration_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(CONFIG)
    (tmp_path / "typo.toml").write_text(CONFIG + "[train]\nlrr = 1\n")
    made = [
        words
        for name in ("run", "partition", "plan", "compare", "attack")
        for words in (
            [name, str(file), "train.lrr=1"],
            [name, str(file), "method.name=rolara"],
            [name, str(tmp_path / "typo.toml")],
            [name, str(tmp_path / "missing.toml")],
        )
    ]
    found = ended(made)
    assert len(found) == len(made)
    assert found == dict.fromkeys(found, (2, []))


def test_a_folder_that_is_taken_is_told_before_the_model_s_libraries_are_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    words = ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path)]
    assert ended([words]) == {" ".join(words): (2, ["torch"])}  # options of rules are tried out


def test_what_reads_run_folders_or_prints_help_loads_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "one")
    report = str(tmp_path / "report.html")
    found = ended(
        [
            ["--help"],
            ["compare", "--help"],
            ["fetch"],
            ["runs", str(run.parent)],
            ["report", str(run), "--out", report],
        ]
    )
    assert found == dict.fromkeys(found, (0, []))
    assert Path(report).is_file()
    assert fresh("import sys, rolora.report.live; print('torch' in sys.modules)") == "False"
