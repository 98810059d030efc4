"""The commands of a site's operator, and of the coordinator."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from rolora.cli.options import Json, Overrides, names
from rolora.cli.printing import err_console, out_console, show, working
from rolora.errors import ConfigError, RoloraError, printable

federation = typer.Typer(
    no_args_is_help=True, help="Make keys for a federation, serve it, or try one on this machine."
)

Folder = Annotated[Path, typer.Option(help="the federation's folder")]
PORT = 8000


def site(
    config: Annotated[Path, typer.Option(help="the site's TOML file")] = Path("site.toml"),
    check: Annotated[bool, typer.Option("--check", help="check the setup without joining")] = False,
    run: Annotated[
        str | None,
        typer.Option(help="with --check: a run's TOML file, to check that rows and model fit"),
    ] = None,
    json: Json = False,
    parent_pid: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Connect this site to its coordinator, and train on its rows when asked.

    Rows never leave the site. What leaves it is listed in outgoing.log in its state folder.
    """
    from rolora.sites.logs import escape_records
    from rolora.sites.node import serve
    from rolora.sites.processes import end_with_parent
    from rolora.sites.site import Site
    from rolora.sites.site_config import read_site

    settings = read_site(config)
    if check:
        _examine_site(settings, run, json)
        return
    escape_records()
    if parent_pid is not None:
        end_with_parent(parent_pid)
    serve(settings, Site(settings).answer, _notify)


def doctor(
    place: Annotated[Path, typer.Argument(help="a site.toml, or a federation folder")],
    run: Annotated[
        str | None, typer.Option(help="for a site: a run's TOML file, to check rows and model")
    ] = None,
    json: Json = False,
) -> None:
    """Check the setup of a site or a coordinator, one line for each check."""
    from rolora.sites.doctor import examine_federation
    from rolora.sites.folder import FederationFolder
    from rolora.sites.site_config import read_site

    if place.is_dir():
        _report(examine_federation(FederationFolder.open(place)), json)
    else:
        _examine_site(read_site(place), run, json)


@federation.command()
def keys(
    sites: Annotated[str, typer.Option(help="comma-separated names, such as ann,bob")],
    host: Annotated[
        str | None, typer.Option(help="the name or address at which sites reach this machine")
    ] = None,
    port: Annotated[int, typer.Option(help="the port that sites connect to")] = PORT,
    folder: Folder = Path("federation"),
    json: Json = False,
) -> None:
    """Make a CA, a server certificate and a key for each site, or add sites to a folder."""
    from rolora.sites.folder import FederationFolder

    say = _notify if json else out_console.print
    if not folder.exists():
        if not host:
            raise ConfigError("a new federation needs --host, where sites reach this machine")
        made = FederationFolder.create(folder, host, port)
        say(f"made {folder}: a CA, and a server certificate for {host}")
    else:
        made = FederationFolder.open(folder)
        if host not in (None, made.host):
            raise ConfigError(f"{folder} is for {made.host}: make another folder for {host}")
    given = {}
    for name in _listed(sites):
        given[name] = str(made.add_site(name))
        say(f"site {name}: give it {given[name]}, which contains its key")
    if json:
        show(json, {"folder": str(folder), "sites": given})


@federation.command()
def remove(
    sites: Annotated[str, typer.Option(help="comma-separated names, such as ann,bob")],
    folder: Folder = Path("federation"),
    json: Json = False,
) -> None:
    """Refuse these sites' keys from now on. The federation must be running."""
    from rolora.sites.folder import FederationFolder

    opened, listed = FederationFolder.open(folder), _listed(sites)
    for name in listed:
        opened.remove_site(name)
        (_notify if json else out_console.print)(f"site {name}: its key is no longer accepted")
    if json:
        show(json, {"folder": str(folder), "removed": listed})


@federation.command()
def serve(folder: Folder = Path("federation")) -> None:
    """Run the coordinator's programs until interrupted; if one ends, end the others too."""
    from rolora.sites import serve as programs
    from rolora.sites.folder import FederationFolder

    programs.serve(FederationFolder.open(folder), _notify)


@federation.command()
def up(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.toml]", help="default: the demo's questions")
    ] = None,
    overrides: Overrides = None,
    sites: Annotated[int, typer.Option(min=1, help="number of sites to split the rows among")] = 3,
    port: Annotated[int, typer.Option(help="the port that sites connect to")] = PORT,
    folder: Folder = Path("federation"),
) -> None:
    """Try a run across sites on this machine: TLS, keys, real processes, split rows.

    A new folder gets keys, and each site its share of the configuration's rows; a folder that
    exists is used as it is.
    """
    from rolora.sites.folder import FederationFolder
    from rolora.sites.local_trial import make_trial
    from rolora.sites.serve import serve

    if not folder.exists():
        if config is None:
            from rolora.demo.side_by_side import prepare_demo

            config, overrides = str(prepare_demo(Path("demo")).file), []
        make_trial(folder, config, overrides or [], sites, port)
    opened = FederationFolder.open(folder)

    def ready() -> None:
        _notify("all sites are up; start the run in another terminal:")
        _notify(f"  rolora run {folder / 'run.toml'} --on {folder}")

    _notify(f"starting {len(opened.public)} sites ...")
    serve(opened, _notify, list(opened.public), ready)


def across_sites(settings: Any, out: Path, as_json: bool, rounds: int | None = None) -> None:
    """Run or resume on the sites of ``federation.on``, showing the run's progress."""
    from rolora.cli.results import show_result
    from rolora.sites.submit import run_remotely

    with working("running across sites"):
        run_remotely(settings, out, _notify, rounds)
    show_result(out, as_json)


def _examine_site(settings: Any, run: str | None, as_json: bool) -> None:
    from rolora.config.load import load_config
    from rolora.sites.doctor import examine_site

    wanted = load_config(run).model_dump_json(exclude_none=True) if run else None
    with working("checking rows, model and connection"):
        found = list(examine_site(settings, wanted))
    _report(found, as_json)


def _report(findings: Iterable[Any], as_json: bool) -> None:
    """Print the findings. RoloraError if one is not good."""
    found = list(findings)
    lines = [f"{'ok  ' if one.good else 'BAD '} {one.what:14} {one.detail}" for one in found]
    show(as_json, [dataclasses.asdict(one) for one in found], *map(printable, lines))
    bad = [one.what for one in found if not one.good]
    if bad:
        raise RoloraError(f"{len(bad)} of {len(found)} checks failed: {', '.join(bad)}")


def _listed(text: str) -> list[str]:
    if not (found := names(text)):
        raise ConfigError("--sites is empty: give comma-separated names, such as ann,bob")
    return found


def _notify(line: str) -> None:
    err_console.print(printable(line))
    sys.stderr.flush()
