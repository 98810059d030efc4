"""Flower's two apps: the site's, which answers, and the coordinator's, which runs the rounds."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from rolora.config.load import load_config
from rolora.flower.transport import GridCarrier, packed, unpacked
from rolora.run import runs
from rolora.run.progress import described
from rolora.sites.coordinator import prepare_remote
from rolora.sites.site import Site
from rolora.sites.site_config import read_site
from rolora.sites.submit import JobFolder

client = ClientApp()
server = ServerApp()


@client.query()  # type: ignore[untyped-decorator]
@client.train()  # type: ignore[untyped-decorator]
@client.evaluate()  # type: ignore[untyped-decorator]
def reply(message: Message, context: Context) -> Message:
    """Answer one question in a SuperNode of Flower's, whose node config names a site.toml."""
    site = Site(read_site(str(context.node_config["site"])))
    return Message(packed(site.answer(unpacked(message.content))), reply_to=message)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Start or resume the run that the job folder asks for, and see it to its end."""
    job = JobFolder(Path(str(context.run_config["job"])))
    order = json.loads(job.order.read_text())
    out = Path(order["out"])
    with (
        job.alive(),
        job.progress.open("a", buffering=1) as lines,
        contextlib.redirect_stderr(lines),
    ):
        say = partial(print, file=lines)
        build = partial(prepare_remote, carrier=GridCarrier(grid), tell=say)
        if (out / "config.toml").is_file():
            run = runs.resume(out, order["rounds"], build)
        else:
            run = runs.start(load_config(job.config), out, build)
        for note in run.notes:
            say(f"note: {note}")
        for _, line in described(run.rounds(), run):
            say(f"{run.experiment.config.name}: {line}")
