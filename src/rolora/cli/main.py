"""The command line: every command calls one library function and prints the result.

Results go to standard output, progress to standard error. ``rolora.errors`` has the exit codes.
A command reads its configuration before it imports what needs torch, which takes seconds, so that
a mistake in it is reported immediately.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import rolora
from rolora.cli.attack import attack
from rolora.cli.chat import chat
from rolora.cli.compare import compare
from rolora.cli.demo import demo, fetch
from rolora.cli.export import export
from rolora.cli.options import Changes, ConfigPath, Json, Overrides, names
from rolora.cli.printing import (
    Interrupted,
    note,
    out_console,
    resuming,
    show,
    tracked,
    working,
)
from rolora.cli.runs import env, list_runs, watch
from rolora.cli.sites import across_sites, doctor, federation, site
from rolora.cli.theory import theory
from rolora.errors import EXIT_CODES, ConfigError, ModelNotHere, NotHere, RoloraError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rolora.run.runs import Run

# the panels of --help, in their order
TRAIN, LOOK, USE = "Train", "Look", "Use the adapter"
SITES, TRY = "Across sites", "Data and demos"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Federated LoRA fine-tuning with exact averages.",
    epilog="Exit codes: " + " · ".join(f"{code} {what}" for code, what in EXIT_CODES.items()),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rolora {rolora.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="print the version"),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=TRAIN)
def init(
    data: Annotated[
        str,
        typer.Argument(help="your rows: a file, folder or pattern, a hub name, or glue/mnli"),
    ],
    out: Annotated[Path, typer.Option(help="the configuration to write")] = Path("rolora.toml"),
    model: Annotated[
        str,
        typer.Option(
            help="the base model: a folder, hub:NAME or a .gguf file; default: a small one of "
            "rolora fetch"
        ),
    ] = "",
    delimiter: Annotated[
        str | None, typer.Option(help="the delimiter of a CSV file; default: detected")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="the encoding of text files; default: detected")
    ] = None,
    trainer: Annotated[
        Path | None,
        typer.Option("--from", help="take settings from this YAML file of trl sft, dpo or kto"),
    ] = None,
    json: Json = False,
) -> None:
    """Look at your rows, write a commented configuration, and show how it splits them."""
    from rich.text import Text

    from rolora.cli.tables import masked_text, split_table
    from rolora.files import write_file
    from rolora.proposal.template import propose
    from rolora.run.runs import training_masks

    proposal = propose(data, out, model, delimiter, encoding, trainer)
    notes, experiment = proposal.notes, proposal.experiment
    table, config = experiment.rows.table(), experiment.config
    columns = [f"{key} = {value!r}" for key, value in experiment.columns.items()]
    made: dict[str, object] = {"config": str(out), "notes": notes, "split": table}
    parts: list[RenderableType] = [
        Text(f"{experiment.kind.name}: {printable(', '.join(columns))}"),
        *(Text(f"note: {note}") for note in notes),
        printable(f"wrote {out}"),
        split_table(table, experiment.rows.test.num_rows),
    ]
    if experiment.kind.head == "causal_lm" and (config.root / config.model.path).exists():
        with working("loading the tokenizer"):
            made["masks"] = masked = training_masks(experiment, 2)
        parts.append(masked_text(masked))
    write_file(out, proposal.text)
    show(json, made, *parts, "\nnext: " + printable(f"rolora run {out}"))


@app.command(rich_help_panel=TRAIN)
def partition(
    config: ConfigPath,
    overrides: Overrides = None,
    picture: Annotated[Path, typer.Option(help="the picture to save: .png or .svg")] = Path(
        "partition.png"
    ),
    show_masks: Annotated[
        bool, typer.Option("--show-masks", help="show which tokens of some rows are trained on")
    ] = False,
    json: Json = False,
) -> None:
    """Show which client holds which rows, and save a picture of it. Trains nothing."""
    from rolora.config.load import load_config

    settings = load_config(config, overrides or [])
    from rolora.cli.tables import masked_text, split_table
    from rolora.report.figures import save_picture, split_figure
    from rolora.run.experiment import Experiment
    from rolora.run.runs import training_masks

    experiment = Experiment(settings)
    rows = experiment.rows
    table = rows.table()
    save_picture(split_figure(table), picture)
    parts: list[RenderableType] = [split_table(table, rows.test.num_rows), f"\npicture   {picture}"]
    if show_masks:
        with working("loading the tokenizer"):
            masked = training_masks(experiment, 3)
        table = {**table, "masks": masked}
        parts.append(masked_text(masked))
    show(json, table, *parts)


@app.command(rich_help_panel=TRAIN)
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="methods, comma-separated; default: the configured one")
    ] = None,
    json: Json = False,
) -> None:
    """Estimate the memory, traffic, compute and disk of a run. Downloads no weights."""
    from rolora.config.load import load_config

    settings = load_config(config, overrides or [])
    from rolora.cli.tables import plan_text
    from rolora.plan.needs import make_plan
    from rolora.run.experiment import Experiment

    with working("running a step on shapes alone"):
        made = make_plan(Experiment(settings), names(methods))
    timed = "\ntime is not estimated: rolora run shows the time left after each round"
    show(json, dataclasses.asdict(made), plan_text(made), timed)


@app.command(rich_help_panel=TRAIN)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the new run folder; default: runs/NAME")] = None,
    on: Annotated[
        str | None, typer.Option(help="run on the sites of this federation folder")
    ] = None,
    suspicious: Annotated[
        int | None,
        typer.Option(min=1, help="withstand this many malicious clients in each round"),
    ] = None,
    json: Json = False,
) -> None:
    """Fine-tune: train, checkpoint every round, write the adapter and the report."""
    from rolora.config.load import load_config, toml_text
    from rolora.run.place import new_path

    byzantine = [] if suspicious is None else [f"aggregate.byzantine={suspicious}"]
    changes = [*byzantine, *(overrides or [])]
    settings = load_config(config, changes)
    if byzantine:
        note(settings.aggregate.price)
    if on is not None:
        if Path(on).is_dir():  # named from here; a run keeps it as seen from the configuration
            on = os.path.relpath(Path(on).resolve(), settings.root)
        settings = load_config(config, [*changes, f"federation.on={toml_text(on)}"])
    path = new_path(settings, out)
    from rolora.run import runs
    from rolora.run.experiment import Experiment

    with resuming(path):
        if settings.federation.on:
            across_sites(settings, path, json)
            return
        with working("loading the model and the data"):
            started = runs.start(settings, path, partial(Experiment, tracked=tracked))
        _follow(started, json)


@app.command(rich_help_panel=TRAIN)
def resume(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=PLACE]...",
            help="where files have moved to: data.train=NEW, ...; or train.workers=N",
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="the folder that relative paths now start from")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="the new total number of rounds")] = None,
    json: Json = False,
) -> None:
    """Continue a run from its last checkpoint, as if it had never stopped.

    Its files may have moved: hashes tell whether they are still the same.
    """
    from rolora.run import runs
    from rolora.run.experiment import Experiment
    from rolora.run.folder import RunFolder

    folder = RunFolder.open(path)
    settings, _ = runs.stored(folder, places or [], root)
    if settings.federation.on and rounds is None and folder.report.is_file():
        _finished(path, json, trained=False)
        return
    with resuming(path):
        if settings.federation.on:
            across_sites(settings, path, json, rounds)
            return
        with working("loading the model and the data"):
            build = partial(Experiment, tracked=tracked)
            resumed = runs.resume(path, rounds, build, overrides=places or [], root=root)
        _follow(resumed, json)


app.command(rich_help_panel=TRAIN)(compare)
app.command(rich_help_panel=TRAIN)(attack)


@app.command(rich_help_panel=LOOK)
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    out: Annotated[Path, typer.Option(help="the HTML page to write")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Write one page about one or more runs: curves, tables, the split, the configuration."""
    from rolora.cli.results import show_results
    from rolora.report.page import write_report
    from rolora.results.runs import load_run

    for path in paths:
        if out.resolve() == path.resolve() / "report.html" and not load_run(path).finished:
            raise ConfigError(
                f"{out} marks the end of a run, and {path} is not finished: set --out"
            )
    write_report(paths, out)
    show_results(paths, json, f"\nreport   {out}")


@app.command(rich_help_panel=LOOK)
def methods(json: Json = False) -> None:
    """List the methods: what each trains and sends, and its paper."""
    from rolora.cli.tables import methods_table
    from rolora.plan.method_table import describe_methods

    rows = describe_methods()
    show(json, [dataclasses.asdict(row) for row in rows], methods_table(rows))


@app.command("eval", rich_help_panel=USE)
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run folder or an adapter folder")
    ],
    data: Annotated[
        str,
        typer.Option(help="rows with the run's columns; with a pattern, each file separately"),
    ],
    overrides: Changes = None,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    json: Json = False,
) -> None:
    """Measure a finished run, or an adapter folder, on other rows."""
    from rolora.cli.results import scores, sets_table
    from rolora.data.tables import files_of, is_glob
    from rolora.run.evaluation import evaluate_each

    if is_glob(data, root=Path()):
        sets = {name: file for file, name in files_of(data, root=Path()).items()}
        with working(f"loading and evaluating on {len(sets)} sets of rows"):
            found = dict(evaluate_each(path, sets, model, overrides or [], note))
        metrics = {name: one.metrics for name, one in found.items()}
        show(json, {name: scores(one) for name, one in found.items()}, sets_table(metrics))
        return
    with working("loading and evaluating"):
        ((_, one),) = evaluate_each(path, {data: data}, model, overrides or [], note)
    show(json, scores(one), *(f"{name:20} {value:.4f}" for name, value in one.metrics.items()))


@app.command(rich_help_panel=USE)
def predict(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run folder or an adapter folder")
    ],
    data: Annotated[
        str,
        typer.Option(help="rows with the run's columns; labels or expected answers are not needed"),
    ],
    overrides: Changes = None,
    out: Annotated[
        Path | None, typer.Option(help="a .csv or .jsonl file; default: print JSON lines")
    ] = None,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="causal_lm: maximum tokens in a completion")
    ] = 128,
) -> None:
    """Write what a finished run, or an adapter folder, predicts for each of your rows."""
    from rolora.files import write_file
    from rolora.run.prediction import predict, writer

    written = writer(out)
    with working("loading and predicting"):
        found = predict(path, data, model, overrides or [], max_new_tokens, note)
    if out is None:
        print(written(found), end="")
    else:
        write_file(out, written(found))
        out_console.print(f"wrote {len(found)} predictions to {out}")


app.command(rich_help_panel=USE)(export)
app.command(rich_help_panel=USE)(chat)
app.command("runs", rich_help_panel=LOOK)(list_runs)
app.command(rich_help_panel=LOOK)(watch)
app.command(rich_help_panel=LOOK)(env)
app.command(rich_help_panel=SITES)(site)
app.add_typer(federation, name="federation", rich_help_panel=SITES)
app.command(rich_help_panel=SITES)(doctor)
app.command(rich_help_panel=TRY)(fetch)
app.command(rich_help_panel=TRY)(demo)
app.command(rich_help_panel=TRY)(theory)

for command in (*app.registered_commands, *federation.registered_commands):
    paragraphs = str(inspect.getdoc(command.callback)).split("\n\n")  # typer joins the first alone
    command.help = "\n\n".join(" ".join(lines.split()) for lines in paragraphs)


def _follow(run: Run, as_json: bool) -> None:
    from rolora.cli.progress import follow

    rounds = follow(run, run.experiment.config.name)
    _finished(run.folder.path, as_json, trained=rounds > 0)


def _finished(path: Path, as_json: bool, *, trained: bool) -> None:
    from rolora.cli.results import show_result

    if not trained and not as_json:
        out_console.print("nothing left to do")
    show_result(path, as_json)


def main() -> None:
    """The ``rolora`` command: every error is one line and a documented exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    # a forked worker that raised inside a library would leave the library's locks held
    for number in (signal.SIGTERM, signal.SIGHUP):
        usual = partial(signal.signal, number, signal.SIG_DFL)
        os.register_at_fork(after_in_child=usual)
    try:
        app(prog_name="rolora")
    except (NotHere, ModelNotHere) as error:
        from rolora.demo.fetch import how_to_get

        hint = "" if error.path is None else how_to_get(error.path)
        moved = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        _leave(f"{error}{hint}{moved}", error.exit_code)
    except RoloraError as error:
        _leave(f"{error}{_continued(error)}", error.exit_code)
    except Interrupted as error:
        how = _continued(error)
        _leave(f"interrupted{'; finished rounds are saved' if how else ''}{how}", 130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno == errno.ENOSPC
        hint = f"; free some space{_continued(error)}" if full else ""
        _leave(f"{os.strerror(error.errno) if error.errno else error}{where}{hint}", 1)


def _continued(error: BaseException) -> str:
    """The command that continues what the error interrupted, if there is one."""
    return "".join(f"; continue with: {how}" for how in getattr(error, "__notes__", [])[:1])


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted


def _leave(message: str, code: int) -> None:
    print(f"rolora: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
