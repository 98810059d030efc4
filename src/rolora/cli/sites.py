"""The commands for runs across sites: of the site's operator, and of the coordinator."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from rolora.cli.printing import err_console, out_console, print_json, working
from rolora.errors import ConfigError, RoloraError

federation = typer.Typer(
    no_args_is_help=True, help="Keys and programs of a coordinator; a federation to try things on."
)

Folder = Annotated[Path, typer.Option(help="the federation's folder")]
PORT = 8000


def site(
    config: Annotated[Path, typer.Option(help="the site's TOML file")] = Path("site.toml"),
    check: Annotated[
        bool, typer.Option("--check", help="look at everything, join nothing")
    ] = False,
    run: Annotated[
        str | None, typer.Option(help="with --check: a run's TOML, to try this site's rows on")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print what a program would read")] = False,
    parent_pid: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Take part with this site's rows: connect, and train whenever the coordinator asks.

    Rows never leave. What leaves is written to outgoing.log in the site's state folder.
    """
    _need_flower()
    from rolora.sites.node import leave_with, serve
    from rolora.sites.site import Site
    from rolora.sites.site_config import read_site

    settings = read_site(config)
    if check:
        _examine_site(settings, run, json)
        return
    if parent_pid is not None:
        leave_with(parent_pid)
    serve(settings, Site(settings).answer, _tell)


def doctor(
    place: Annotated[Path, typer.Argument(help="a site.toml, or a federation's folder")],
    run: Annotated[
        str | None, typer.Option(help="for a site: a run's TOML, to try this site's rows on")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print what a program would read")] = False,
) -> None:
    """Say what is wrong with a setup, one line for each thing looked at."""
    _need_flower()
    from rolora.sites.doctor import examine_federation
    from rolora.sites.folder import FederationFolder
    from rolora.sites.site_config import read_site

    if place.is_dir():
        _report(examine_federation(FederationFolder.open(place)), json)
    else:
        _examine_site(read_site(place), run, json)


@federation.command()
def keys(
    sites: Annotated[str, typer.Option(help="names of sites with commas, such as ann,bob")],
    host: Annotated[
        str | None, typer.Option(help="the name or address under which sites reach this machine")
    ] = None,
    port: Annotated[int, typer.Option(help="that the SuperLink listens on")] = PORT,
    folder: Folder = Path("federation"),
) -> None:
    """Make a CA, the server's certificate and a key for each site; add sites to a folder."""
    _need_flower()
    from rolora.sites.folder import FederationFolder

    if not folder.exists():
        if host is None:
            raise ConfigError("a new federation needs --host: how sites reach this machine")
        made = FederationFolder.create(folder, host, port)
        out_console.print(f"made {folder}: its own CA, a certificate for {host}", markup=False)
    else:
        made = FederationFolder.open(folder)
        if host not in (None, made.host):
            raise ConfigError(f"{folder} is for {made.host}; make another folder for {host}")
    for name in _listed(sites):
        given = made.add_site(name)
        out_console.print(f"site {name}: hand over {given} (its key is in there)", markup=False)


@federation.command()
def remove(
    sites: Annotated[str, typer.Option(help="names of sites with commas, such as ann,bob")],
    folder: Folder = Path("federation"),
) -> None:
    """Shut sites out: their keys are refused from now on. The federation must be served."""
    _need_flower()
    from rolora.sites.folder import FederationFolder

    opened = FederationFolder.open(folder)
    for name in _listed(sites):
        opened.remove_site(name)
        out_console.print(f"site {name}: its key is no longer accepted", markup=False)


@federation.command()
def serve(folder: Folder = Path("federation")) -> None:
    """Run the coordinator's programs, and start them again when they end, until interrupted."""
    _need_flower()
    from rolora.sites.folder import FederationFolder
    from rolora.sites.serve import keep, serving

    opened = FederationFolder.open(folder)
    with serving(opened, _tell) as supervisor:
        _tell(f"serving {opened.host}:{opened.port}; runs go to it with: --on {folder}")
        keep(supervisor, opened)


@federation.command()
def up(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.toml]", help="left out: the demo's questions")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    sites: Annotated[int, typer.Option(min=1, help="among which the rows are split")] = 3,
    port: Annotated[int, typer.Option(help="that the SuperLink listens on")] = PORT,
    folder: Folder = Path("federation"),
) -> None:
    """Try a run of yours across sites on this machine: TLS, keys, real processes, split rows.

    A new folder gets keys, and each site its share of the configuration's rows. A folder that is
    there already is started again.
    """
    _need_flower()
    from rolora.sites.folder import FederationFolder
    from rolora.sites.local_trial import rehearse
    from rolora.sites.serve import keep, serving, site_program

    if not folder.exists():
        if config is None:
            from rolora.demo.side_by_side import classification_demo

            config, overrides = str(classification_demo(Path("demo")).file), []
        rehearse(folder, config, overrides or [], sites, port)
    opened = FederationFolder.open(folder)
    with serving(opened, _tell) as supervisor:
        for name in opened.public:
            supervisor.add(site_program(opened, opened.path / "sites" / name))
        _tell(f"{len(opened.public)} sites are up; in another terminal:")
        _tell(f"  rolora run {folder / 'run.toml'} --on {folder}")
        keep(supervisor, opened)


def across_sites(settings: Any, out: Path, as_json: bool, rounds: int | None = None) -> None:
    """Run or resume on the sites of ``federation.on``, showing what the coordinator's app says."""
    from rolora.cli.results import print_results
    from rolora.sites.submit import run_remotely

    with working(f"running on {settings.federation.on}"):
        run_remotely(settings, out, _tell, rounds)
    print_results(out, as_json)


def _examine_site(settings: Any, run: str | None, as_json: bool) -> None:
    from rolora.config.load import load_config
    from rolora.sites.doctor import examine_site

    config = load_config(run) if run else None
    with working("looking at rows, model and connection"):
        found = list(examine_site(settings, config))
    _report(found, as_json)


def _report(findings: Iterable[Any], as_json: bool) -> None:
    """Print them; leave with 1 if one is not good."""
    found = list(findings)
    if as_json:
        print_json([{"what": f.what, "good": f.good, "detail": f.detail} for f in found])
    else:
        for one in found:
            mark = "ok  " if one.good else "BAD "
            out_console.print(f"{mark} {one.what:14} {one.detail}", markup=False)
    bad = [one.what for one in found if not one.good]
    if bad:
        raise RoloraError(f"{len(bad)} of {len(found)} things are wrong: {', '.join(bad)}")


def _listed(text: str) -> list[str]:
    if not (names := [name.strip() for name in text.split(",") if name.strip()]):
        raise ConfigError("--sites names no site: give names with commas, such as ann,bob")
    return names


def _need_flower() -> None:
    if find_spec("flwr") is None:
        raise ConfigError("runs across sites need Flower: pip install 'rolora[flower]'")


def _tell(line: str) -> None:
    err_console.print(line, markup=False)
    sys.stderr.flush()
