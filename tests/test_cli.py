"""The command line: exit codes, one clear line for every mistake, results where programs look."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from tiny_site import write_rows
from typer.main import get_command

from rolora import methods
from rolora.cli import main as cli
from rolora.cli import printing
from rolora.cli.printing import Interrupted
from rolora.config.load import load_config
from rolora.demo.side_by_side import Demo
from rolora.errors import EXIT_CODES
from rolora.run import runs
from rolora.run.experiment import Experiment


@pytest.fixture(autouse=True)
def _keep_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)


def rolora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["rolora", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    captured = capsys.readouterr()
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def broken_site(tmp_path: Path, site: Path) -> Path:
    shutil.copytree(site.parent, tmp_path / "site")
    return tmp_path / "site" / site.name


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("train.rouds=3", 2, "did you mean 'train.rounds'"),
        ("train.rounds=many", 2, "train.rounds: Input should be a valid integer"),
        ("data.train=none.csv", 3, "none.csv"),
        ("data.text=txet", 3, "no column 'txet': did you mean 'text'?"),
        ("data.label=lable", 3, "no column 'lable'"),
        ("data.train=empty.csv", 3, "empty.csv"),
        ("data.train=one-class.csv", 3, "only one label ('good')"),
        ("partition.clients=600", 3, "600"),
        ("data.test=strange.csv", 3, "label 'ugly' does not occur in the training data"),
        ("data.train=parts/site-*.csv", 3, "there is no folder"),
        ("partition.scheme=files", 2, "partition.scheme = 'files' needs a data.train pattern"),
        ("data.delimiter=;;", 2, "delimiter ';;' is not one ASCII character"),
        ("data.encoding=utf-9", 2, "encoding 'utf-9' is not known to Python"),
        ("model.path=./nowhere", 2, "model folder './nowhere' does not exist"),
        ("model.path=pictures", 2, "cannot load model 'pictures'"),
        ("model.path=model/none.gguf", 2, "does not exist"),
        ('lora.target_modules=["quary"]', 2, "no layer is named 'quary'"),
        ("lora.layers=top:9", 2, "lora.layers = 'top:9'"),
        ("lora.init_from=model", 2, "is not a PEFT adapter"),
        ("device=cuda", 2, "device = 'cpu'"),
        ("train.lr=1e30", 1, "is not finite in round"),
        ("eval.metric=f2", 2, "eval.metric 'f2'"),
        ("model.task=causal_lm", 2, "data.completion, or data.messages"),
        ("aggregate.quorum=9", 2, "quorum"),
    ],
)
def test_a_mistake_ends_with_its_code_and_one_line_and_leaves_no_folder(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    code: int,
    said: str,
) -> None:
    config = broken_site(tmp_path, site)
    (config.parent / "empty.csv").write_text("")
    write_rows(config.parent / "one-class.csv", 20, ["good"])
    (config.parent / "strange.csv").write_text("text,label\na film,ugly\n")
    (config.parent / "pictures").mkdir()
    (config.parent / "pictures" / "config.json").write_text('{"model_type": "vit_mae"}')
    out = tmp_path / "out"
    got, _, err = rolora(monkeypatch, capsys, "run", config, change, "--out", out)
    last = [text for text in err.splitlines() if text.startswith("rolora:")]
    assert (got, len(last)) == (code, 1), err
    assert said in last[0]
    assert "Traceback" not in err
    if code != 1:
        assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            "lora.rank=[2,4]",
            "rolora does not support clients of different ranks: set lora.rank to one number",
        ),
        (
            "method.name=flexlora aggregate.optimizer=fedavgm",
            "flexlora does not support the server optimizer",
        ),
        (
            "method.name=local aggregate.optimizer=fedadam",
            "local does not support the server optimizer",
        ),
        ("method.b_rounds=0", "b_rounds must be at least 1, not 0"),
        ("method.b_round=2", "unknown key 'method.b_round': did you mean 'method.b_rounds'?"),
        ("method.name=flora method.b_rounds=2", "method 'flora' has no options"),
        ("method.name=ravan method.heads=3", "heads = 3 does not divide lora.rank = 2"),
        ("method.name=ravan method.heads=0", "heads = 0 does not divide lora.rank = 2"),
        ("method.name=hetlora method.gamma=0", "gamma must be in (0, 1], not 0.0"),
        ("method.name=hetlora method.gamma=1.5", "gamma must be in (0, 1], not 1.5"),
        ("method.name=lora_a2 method.keep=0", "keep must be in (0, 1], not 0.0"),
        ("method.name=lora_a2 method.keep=2", "keep must be in (0, 1], not 2.0"),
        ("method.name=fedmomentum method.energy=0", "energy must be in (0, 1], not 0.0"),
        ("method.name=fedmomentum method.energy=1.1", "energy must be in (0, 1], not 1.1"),
        ("method.name=fedrot_lora method.softness=2", "softness must be in [0, 1], not 2.0"),
        ("method.name=lora_fair method.ridge=-1", "ridge must be at least 0, not -1.0"),
        ("method.name=la_lora train.local_steps=1", "set train.local_steps to at least 2"),
        ("train.b_lr_ratio=0", "train.b_lr_ratio: Input should be greater than 0"),
        ("aggregate.server_lr=-1", "aggregate.server_lr: Input should be greater than 0"),
    ],
)
def test_what_a_method_or_the_server_cannot_do_is_refused_in_one_line_with_code_2(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: str,
    said: str,
) -> None:
    out = tmp_path / "out"
    code, _, err = rolora(monkeypatch, capsys, "run", site, *changes.split(), "--out", out)
    last = [text for text in err.splitlines() if text.startswith("rolora:")]
    assert (code, len(last)) == (2, 1), err
    assert said in last[0]
    assert "Traceback" not in err
    assert not out.exists()


def test_per_client_files_with_an_empty_one_name_it(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = broken_site(tmp_path, site)
    (config.parent / "parts").mkdir()
    write_rows(config.parent / "parts" / "site-a.csv", 9)
    (config.parent / "parts" / "site-b.csv").write_text("text,label\n")
    words = ("run", config, "data.train=parts/site-*.csv", "partition.scheme=files")
    code, _, err = rolora(monkeypatch, capsys, *words, "--out", tmp_path / "out")
    assert code == 3
    assert "site-b.csv" in err.splitlines()[-1]


def test_client_files_that_are_not_made_clients_are_said_to_be_split_anew(
    site: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"site-{name}.csv", 20)
    changes = [f"data.train={tmp_path}/site-*.csv", "data.test=0.2"]
    assert 'partition.scheme = "files" makes each a client' in split_note(site, changes)
    assert not split_note(site, [*changes, "partition.scheme=files"])


def split_note(config: Path, changes: list[str]) -> str:
    return Experiment(load_config(config, changes)).rows.note


def test_rows_longer_than_the_model_takes_are_truncated_counted_and_said(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("run", site, "data.max_length=6", "train.rounds=1", "--out", tmp_path / "out")
    code, _, err = rolora(monkeypatch, capsys, *words)
    assert code == 0
    assert "60 of 60 training rows are longer than 6 tokens" in err


def test_rows_without_text_are_counted_and_said(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = broken_site(tmp_path, site)
    with (config.parent / "train.csv").open("a") as file:
        file.write('"",good\n"  ",bad\n')
    words = ("run", config, "train.rounds=1", "--out", tmp_path / "out")
    code, _, err = rolora(monkeypatch, capsys, *words)
    assert code == 0
    assert "2 of 62 rows of data.train have no text" in err


def test_json_output_is_json_and_nothing_else(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("run", site, "train.rounds=1", "--out", tmp_path / "out", "--json")
    code, out, err = rolora(monkeypatch, capsys, *words)
    assert code == 0
    (row,) = json.loads(out)["methods"]
    assert (row["method"], row["rounds"]) == ("rolora", 1)
    assert "round 1/1" in err  # progress is on standard error, in plain lines


def test_a_run_folder_that_exists_is_refused_and_left_alone(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine").mkdir()
    code, _, err = rolora(monkeypatch, capsys, "run", site, "--out", tmp_path / "mine")
    assert (code, list((tmp_path / "mine").iterdir())) == (2, [])
    assert "not overwritten" in err


def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rolora import files
    from rolora.run import folder

    real, calls = files.new_folder, []

    def full(path: Path, *, replace: bool = False) -> object:
        calls.append(path)
        if path.name == "round-000002":
            raise OSError(28, "No space left on device", str(path))
        return real(path, replace=replace)

    with monkeypatch.context() as patched:
        patched.setattr(folder, "new_folder", full)
        code, _, err = rolora(patched, capsys, "run", site, "--out", tmp_path / "run")
    assert code == 1
    assert "rolora: No space left on device" in err
    again = shlex.quote(str(tmp_path / "run"))
    assert f"free some space; continue with: rolora resume {again}" in err
    assert "Traceback" not in err
    code, _, _ = rolora(monkeypatch, capsys, "resume", tmp_path / "run")
    assert code == 0


@pytest.mark.parametrize("command", ["run", "resume", "compare", "eval", "loading", "demo"])
def test_what_interrupts_a_command_names_the_very_command_that_continues(
    site: Path,
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, config = tmp_path / "my run", load_config(site)
    words: dict[str, list[object]] = {
        "run": ["run", site, "--out", out],
        "resume": ["resume", out],
        "compare": ["compare", site, "--methods", "rolora,fedit", "--out", out],
        "eval": ["eval", out, "--data", site.parent / "test.csv"],
        "loading": ["run", site, "--out", out],
        "demo": ["demo"],
    }
    if command in ("resume", "eval"):
        runs.start(config, out)
    places = {"eval": "rolora.run.evaluation.evaluate_each", "loading": "rolora.run.runs.start"}
    ready = Demo(site, out, (0, 1))
    monkeypatch.setattr("rolora.demo.side_by_side.prepare_demo", lambda folder, task: ready)

    def stopped(*_: object, **__: object) -> None:
        raise Interrupted

    monkeypatch.setattr(places.get(command, "rolora.run.runs.federate"), stopped)
    code, _, err = rolora(monkeypatch, capsys, *words[command])
    assert code == 130
    given = {
        "run": ["rolora", "resume", out],
        "resume": ["rolora", "resume", out],
        "compare": ["rolora", *words["compare"]],
        "demo": [
            *("rolora", "compare", site, "--methods", "rolora,ffa_lora,fedit"),
            *("--seeds", "0,1", "--out", out),
        ],
    }
    last = err.splitlines()[-1]
    if command not in given:
        assert last == "rolora: interrupted"
        return
    how = shlex.join(map(str, given[command]))
    assert last == f"rolora: interrupted; finished rounds are saved; continue with: {how}"


def test_ctrl_c_exits_130_and_the_run_resumes(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["run", str(site), "train.rounds=500", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rolora", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/round-000001*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("rolora: interrupted")
    assert "Traceback" not in err
    assert list(out.glob("checkpoints/round-*"))


def test_a_bar_can_be_shown_while_something_else_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(printing, "err_console", terminal)
    with printing.working("loading"):
        assert list(printing.tracked([1, 2], "running rows")) == [1, 2]
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "loading" in shown
    assert "running rows" in shown


def test_every_command_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {"run", "resume", "compare", "report", "eval", "partition", "methods", "init"} <= set(
        commands
    )
    for name in commands:
        code, out, _ = rolora(monkeypatch, capsys, name, "--help")
        assert code == 0
        assert "Usage" in out


def test_a_paragraph_of_a_help_page_is_broken_where_the_terminal_ends_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for words, said in {
        (
            "compare",
        ): "With --tune, each method first gets its best values, chosen on validation rows "
        "and on seeds that the final table does not use.",
        (
            "federation",
            "up",
        ): "A new folder gets keys, and each site its share of the configuration's "
        "rows; a folder that exists is used as it is.",
    }.items():
        assert said in rolora(monkeypatch, capsys, *words, "--help")[1]


def test_every_command_that_ends_with_a_result_prints_it_as_json_if_asked() -> None:
    """Without: those that serve, and predict, which always prints JSON lines."""
    commands = dict(get_command(cli.app).commands)  # type: ignore[attr-defined]
    below = commands.pop("federation").commands
    every = commands | {f"federation {name}": command for name, command in below.items()}
    without = {
        name
        for name, command in every.items()
        if "--json" not in {option for one in command.params for option in one.opts}
    }
    assert without == {"predict", "watch", "federation serve", "federation up"}


def test_init_names_the_file_of_a_folder_that_is_no_model_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"what is {n},the number {n}\n" for n in range(40))
    (tmp_path / "rows.csv").write_text(f"prompt,completion\n{rows}")
    folder, out = tmp_path / "small", tmp_path / "new.toml"
    folder.mkdir()
    (folder / "small.gguf").touch()
    words = ("init", tmp_path / "rows.csv", "--out", out, "--model", folder)
    code, _, err = rolora(monkeypatch, capsys, *words)
    assert (code, out.exists()) == (2, False)
    assert "has no config.json, but 'small.gguf': give that file" in err


@pytest.mark.parametrize("command", ["init", "partition", "keys"])
def test_with_json_standard_output_is_json_and_nothing_else(
    site: Path,
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words: dict[str, list[object]] = {
        "init": ["init", site.parent / "train.csv", "--out", tmp_path / "new.toml"],
        "partition": ["partition", site, "--picture", tmp_path / "split.png", "--show-masks"],
        "keys": ["federation", "keys", "--sites", "ann,bob", "--host", "localhost"],
    }
    masks = [{"text": [("a film", False), ("good", True)]}]
    monkeypatch.setattr("rolora.run.runs.training_masks", lambda experiment, rows: masks)
    folder = ["--folder", tmp_path / "federation"] if command == "keys" else []
    code, out, _ = rolora(monkeypatch, capsys, *words[command], *folder, "--json")
    found = json.loads(out)
    assert code == 0
    if command == "init":
        assert found["config"] == str(tmp_path / "new.toml")
        assert len(found["notes"]) == 1  # on the model, which is left out
        assert found["split"]["clients"]
    elif command == "partition":
        assert found["masks"] == [{"text": [["a film", False], ["good", True]]}]
        assert sum(client["num_examples"] for client in found["clients"]) == 60
    else:
        assert found["sites"].keys() == {"ann", "bob"}
        assert all(Path(path).is_dir() for path in found["sites"].values())


def test_a_shell_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def completed(line: str) -> set[str]:
        monkeypatch.setenv("_ROLORA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
        return set(rolora(monkeypatch, capsys)[1].split())

    assert completed("rolora ru") == {"run", "runs"}
    assert completed("rolora federation re") == {"remove"}
    assert completed("rolora run --o") == {"--out", "--on"}


def test_the_help_names_every_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = rolora(monkeypatch, capsys, "--help")
    for code in EXIT_CODES:
        assert str(code) in out


def test_the_help_shows_every_command_in_a_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = rolora(monkeypatch, capsys, "--help")
    assert "─ Use the adapter ─" in out
    assert "─ Commands ─" not in out


def test_partition_shows_the_split_and_saves_a_picture(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "split.png"
    code, out, _ = rolora(monkeypatch, capsys, "partition", site, "--picture", picture)
    assert code == 0
    assert "60 training rows, 12 test rows" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_init_writes_a_config_that_runs_as_it_is(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "mine.toml"
    words = ("init", site.parent / "train.csv", "--out", config, "--model", site.parent / "model")
    assert rolora(monkeypatch, capsys, *words)[0] == 0
    run = ("run", config, "train.rounds=1", "partition.clients=3", "--out", tmp_path / "run")
    assert rolora(monkeypatch, capsys, *run)[0] == 0
    code, _, err = rolora(monkeypatch, capsys, "init", site.parent / "train.csv", "--out", config)
    assert (code, "not overwritten" in err) == (2, True)


def test_init_says_which_task_and_columns_it_found_in_lines_that_fit_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [f"a text {n},,{('yes', 'no', 'None')[n % 3]}" for n in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["premise,hypothesis,label", *rows]) + "\n")
    out = tmp_path / "a.toml"
    code, said, _ = rolora(monkeypatch, capsys, "init", tmp_path / "a.csv", "--out", out)
    first, *lines = said.splitlines()
    assert code == 0
    assert first == "classification: text = ['premise', 'hypothesis'], label = 'label'"
    assert "note: label is None in 20 of 60 rows" in said
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []


def test_the_version_is_printed_and_that_is_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rolora(monkeypatch, capsys, "--version") == (0, f"rolora {version('rolora')}\n", "")


def test_methods_lists_every_file_of_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = rolora(monkeypatch, capsys, "methods", "--json")
    folder = Path(methods.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert code == 0
    assert {row["name"] for row in json.loads(out)} == files


def test_resuming_a_finished_run_across_sites_waits_for_nobody(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    list(runs.start(load_config(site, ["train.rounds=1"]), out).rounds())
    text = (out / "config.toml").read_text()
    assert "[federation]" in text
    (out / "config.toml").write_text(text.replace("[federation]", '[federation]\non = "away"'))
    monkeypatch.setattr("rolora.cli.main.across_sites", lambda *_: pytest.fail("asked for sites"))
    code, said, _ = rolora(monkeypatch, capsys, "resume", out)
    assert (code, said.splitlines()[0]) == (0, "nothing left to do")
