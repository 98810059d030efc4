"""Flower's two apps: the site's answers questions, the coordinator's runs the rounds."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from rolora.config.load import load_config, places
from rolora.flower.transport import GridTransport, from_record, to_record
from rolora.run import runs
from rolora.run.progress import described
from rolora.sites.coordinator import across
from rolora.sites.expected import expecting
from rolora.sites.folder import folder_of
from rolora.sites.logs import escape_records
from rolora.sites.site import Site
from rolora.sites.site_config import read_site
from rolora.sites.submit import reporting

client = ClientApp()
server = ServerApp()


@client.query()  # type: ignore[untyped-decorator]
@client.train()  # type: ignore[untyped-decorator]
@client.evaluate()  # type: ignore[untyped-decorator]
def reply(message: Message, context: Context) -> Message:
    """Answer one question in Flower's own SuperNode, whose node config names a site.toml."""
    site = Site(read_site(str(context.node_config["site"])))
    return Message(to_record(site.answer(from_record(message.content))), reply_to=message)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Start or resume the run of the job folder in ``context.run_config``, to its end."""
    job = Path(str(context.run_config["job"]))
    order = json.loads((job / "order.json").read_text())
    out = Path(order["out"])
    escape_records()
    with reporting(job) as lines, ExitStack() as stack:
        notify = partial(print, file=lines)
        transport = stack.enter_context(closing(GridTransport(grid)))
        config = load_config(job / "config.toml")
        if (folder := folder_of(config)) is None:
            build = across(transport, notify)
        else:
            expect = stack.enter_context(expecting(folder.path))
            build = across(transport, notify, folder.names, expect)
        if (out / "config.toml").is_file():
            moved = places(config)
            run = runs.resume(out, order["rounds"], build, overrides=moved, root=config.root)
        else:
            run = runs.start(config, out, build)
        for note in run.notes:
            notify(f"note: {note}")
        for _, line in described(run.rounds(), run):
            notify(f"{run.experiment.config.name}: {line}")
