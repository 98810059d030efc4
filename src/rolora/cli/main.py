"""The command line: every command calls one library function and prints the result.

Results go to standard output, progress to standard error. ``rolora.errors`` has the exit codes.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import rolora
from rolora.cli.compare import compare
from rolora.cli.demo import demo, fetch
from rolora.cli.evaluate import evaluate
from rolora.cli.options import ConfigPath, Json, Out, Overrides
from rolora.cli.plan import plan
from rolora.cli.printing import out_console, print_json, working
from rolora.cli.sites import across_sites, doctor, federation, site
from rolora.cli.theory import theory
from rolora.errors import EXIT_CODES, ModelNotHere, NotHere, RoloraError

if TYPE_CHECKING:
    from rolora.run.runs import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
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


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = None,
    on: Annotated[
        str | None, typer.Option(help="run on the sites of this federation folder")
    ] = None,
    json: Json = False,
) -> None:
    """Fine-tune: train, checkpoint every round, write the adapter and the report."""
    from rolora.config.load import load_config
    from rolora.run import runs

    settings = load_config(config, [*(overrides or []), *_where(on)])
    if settings.federation.on:
        across_sites(settings, runs.new_path(settings, out), json)
        return
    with working("loading the model and the data"):
        started = runs.start(settings, out)
    _follow(started, json)


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    rounds: Annotated[int | None, typer.Option(help="the new total number of rounds")] = None,
    json: Json = False,
) -> None:
    """Continue a run from its last checkpoint, as if it had never stopped."""
    from rolora.cli.results import print_results
    from rolora.config.load import load_config
    from rolora.run import runs
    from rolora.run.folder import RunFolder

    folder = RunFolder.open(path)
    settings = load_config(folder.config)
    if settings.federation.on and rounds is None and folder.report.is_file():
        _nothing_left(json)
        print_results(path, json)
    elif settings.federation.on:
        across_sites(settings, path, json, rounds)
    else:
        with working("loading the model and the data"):
            resumed = runs.resume(path, rounds)
        _follow(resumed, json)


app.command()(compare)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    out: Annotated[Path, typer.Option(help="the HTML page to write")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Write one page about one or more runs: curves, tables, the split, the configuration."""
    from rolora.cli.results import print_runs
    from rolora.report.page import write_report

    write_report(paths, out)
    print_runs(paths, json)
    if not json:
        out_console.print(f"\nreport   {out}")


app.command("eval")(evaluate)


@app.command()
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
    from rolora.cli.tables import masked_text, split_table
    from rolora.config.load import load_config
    from rolora.report.figures import save_picture, split_figure
    from rolora.run.experiment import Experiment
    from rolora.run.runs import training_masks

    settings = load_config(config, overrides or [])
    experiment = Experiment(settings)
    rows = experiment.rows
    table = rows.table()
    save_picture(split_figure(table), picture)
    if json:
        print_json(table)
    else:
        out_console.print(split_table(table, rows.test.num_rows))
        out_console.print(f"\npicture   {picture}")
    if show_masks:
        with working("loading the tokenizer"):
            masked = training_masks(experiment, 3)
        out_console.print(masked_text(masked))


@app.command()
def methods(json: Json = False) -> None:
    """List the methods: what each trains and sends, and its paper."""
    from rolora.cli.tables import print_methods
    from rolora.plan.method_table import describe_methods

    rows = describe_methods()
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_methods(rows)


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="your rows: a file or a pattern of files")],
    out: Annotated[Path, typer.Option(help="the configuration to write")] = Path("rolora.toml"),
    model: Annotated[
        str, typer.Option(help="the base model: a folder, a hub name or a .gguf file")
    ] = "",
) -> None:
    """Look at the columns of your file and write a commented configuration for it."""
    from rolora.run.config_template import write_template

    write_template(data, out, model)
    out_console.print(f"wrote {out}; next: rolora partition {out}")


app.command()(theory)
app.command()(plan)
app.command()(demo)
app.command()(fetch)
app.command()(site)
app.add_typer(federation, name="federation")
app.command()(doctor)


def _where(on: str | None) -> list[str]:
    """``--on`` as an override; a folder is relative to here, not to the configuration."""
    if on is None:
        return []
    return [f"federation.on={Path(on).resolve() if Path(on).is_dir() else on}"]


def _nothing_left(as_json: bool) -> None:
    if not as_json:
        out_console.print("nothing left to do")


def _follow(run: Run, as_json: bool) -> None:
    from rolora.cli.progress import follow
    from rolora.cli.results import print_results

    if follow(run, run.experiment.config.name) is None:
        _nothing_left(as_json)
    print_results(run.folder.path, as_json)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; a BaseException, so that no library handles it as an error."""


def main() -> None:
    """The ``rolora`` command: every error is one line and a documented exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # a forked worker that raised in the middle of a library's code would leave its locks held
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        app()
    except (NotHere, ModelNotHere) as error:
        from rolora.demo.fetch import how_to_get

        hint = "" if error.path is None else how_to_get(error.path)
        _leave(f"{error}{hint}", error.exit_code)
    except RoloraError as error:
        _leave(str(error), error.exit_code)
    except Interrupted:
        again = sys.argv[1:2] in (["compare"], ["site"], ["federation"])
        how = "the same command" if again else "rolora resume RUN"
        _leave(f"interrupted; finished rounds are saved; continue with: {how}", 130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = "; free some space, then: rolora resume RUN" if error.errno == errno.ENOSPC else ""
        _leave(f"{os.strerror(error.errno) if error.errno else error}{where}{hint}", 1)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted


def _leave(message: str, code: int) -> None:
    one_line = " ".join(message.split())
    print(f"rolora: {one_line}", file=sys.stderr)
    sys.exit(code)
