"""Flower's two apps: the site's, which answers, and the coordinator's, which runs the rounds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from rolora import runs
from rolora.config import load_config
from rolora.flower.carrier import GridCarrier, packed, unpacked
from rolora.flower.coordinator import prepare_remote
from rolora.flower.site import answer
from rolora.flower.site_config import read_site

client = ClientApp()
server = ServerApp()


@client.query()  # type: ignore[untyped-decorator]
@client.train()  # type: ignore[untyped-decorator]
@client.evaluate()  # type: ignore[untyped-decorator]
def reply(message: Message, context: Context) -> Message:
    """Answer one question from this node's own site.toml."""
    site = read_site(str(context.node_config["site"]))
    return Message(packed(answer(site, unpacked(message.content))), reply_to=message)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Start or resume the run whose folder the run's configuration names, and go to its end."""
    out = Path(str(context.run_config["out"]))
    build = partial(prepare_remote, carrier=GridCarrier(grid))
    if (out / "config.toml").is_file():
        run = runs.resume(out, build=build)
    else:
        run = runs.start(load_config(str(context.run_config["config"])), out, build)
    for result in run.rounds():
        print(f"round {result.round}: {dict(result.metrics)}", flush=True)
