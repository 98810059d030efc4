"""Flower's own deployment as it comes: a SuperLink, a SuperNode a site, TLS and node keys.

The ServerApp sends everyone the whole adapter with ``grid.send_and_receive``, and takes the
weighted mean of the factor that moved; the ClientApp trains it with PEFT. Nothing of rolora. The
ServerApp stays, and does some rounds a request; SuperNodes start a process for every message.

Timed, inside: rounds from sending to the mean. Each client adds how long its process took to be
ready to train (Python, libraries, the model), and to train.

    python -m benchmarks.peers.flower_sites JOB FEDERATION PORT ROUNDS ADAPTER_FILE AFTER_ROUND

FEDERATION has the keys (rolora.sites.folder wrote them); SuperNodes connect to PORT, which is the
SuperLink's own or that of something between.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.party import Answer, serve
from benchmarks.peers.client import freeze, mean, moving, optimizer, peft_model, read_job, train

client = ClientApp()
server = ServerApp()
APP = """\
[project]
name = "bench"
version = "1.0.0"
license = { text = "Apache-2.0" }
dependencies = ["flwr>=1.41"]
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "bench_apps:server"
clientapp = "bench_apps:client"
"""
CODE = """\
from benchmarks.peers import flower_sites

client = flower_sites.client
server = flower_sites.server
"""


@client.train()  # type: ignore[untyped-decorator]
def train_client(message: Message, context: Context) -> Message:
    """One client, one round, in a process of its own."""
    number, mine = int(message.content["config"]["round"]), str(context.node_config["site"])
    job = read_job(os.environ["JOB_FOLDER"])
    model = peft_model(job)
    loading = time.clock_gettime(time.CLOCK_BOOTTIME) - _started()
    begun = time.perf_counter()
    plan = job.rounds[number - 1]
    (one,) = (each for each in plan["cohort"] if each["id"] == mine)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    freeze(model, plan["trainable"])
    train(model, job.of(number, one), optimizer(model, job))
    sent = moving(get_peft_model_state_dict(model), plan["trainable"])
    metrics = {
        "num-examples": one["num_examples"],
        "loading": loading,
        "training": time.perf_counter() - begun,
    }
    content = RecordDict({"arrays": ArrayRecord(sent), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


def _started() -> float:
    """When this process was started, in seconds since the machine was."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


@server.main()  # type: ignore[untyped-decorator]
def serve_rounds(grid: Grid, context: Context) -> None:
    """Do as many rounds as are asked for, until no more are."""
    job = read_job(os.environ["JOB_FOLDER"])
    whole, number = dict(job.start), 0
    while len(list(grid.get_node_ids())) < job.settings["clients"]:
        time.sleep(0.1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["CHANNEL"])
        channel = connection.makefile("rw")
        for count in channel:
            found = []
            for _ in range(int(count)):
                number += 1
                started = time.perf_counter()
                found.append(_round(grid, whole, number, job.rounds[number - 1]["trainable"]))
                found[-1]["seconds"] = time.perf_counter() - started
                if number == int(os.environ["AFTER_ROUND"]):
                    save_file(whole, os.environ["ADAPTER_FILE"])
            print(json.dumps(found), file=channel, flush=True)


def _round(grid: Grid, whole: dict[str, Any], number: int, trainable: Any) -> dict[str, float]:
    """Train one factor everywhere and put its mean into ``whole``; the slowest client's times."""
    config = ConfigRecord({"round": number})
    questions = [
        Message(RecordDict({"arrays": ArrayRecord(whole), "config": config}), node, "train")
        for node in grid.get_node_ids()
    ]
    updates, slowest = [], {"loading": 0.0, "training": 0.0}
    for reply in grid.send_and_receive(questions):
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        metrics = reply.content["metrics"]
        arrays = reply.content["arrays"].to_torch_state_dict()
        updates.append((moving(arrays, trainable), float(metrics["num-examples"])))
        slowest = {key: max(slowest[key], float(metrics[key])) for key in slowest}
    if len(updates) != len(questions):
        raise RuntimeError(f"{len(updates)} of {len(questions)} answered")
    whole |= mean(updates)
    return slowest


@contextlib.contextmanager
def deployed(federation: Path, port: str) -> Iterator[dict[str, str]]:
    """SuperLink and SuperNodes, until this is left; the environment of Flower's programs."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(federation / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    own = str(tomllib.loads((federation / "federation.toml").read_text())["port"])
    link = [programs / "flower-superlink", "--host", "127.0.0.1", "--port", own]
    link += ["--ssl-ca-certfile", federation / "ca.crt", "--enable-supernode-auth"]
    link += ["--ssl-certfile", federation / "server.crt"]
    link += ["--ssl-keyfile", federation / "server.key"]
    link += ["--disable-runtime-dependency-installation"]
    with contextlib.ExitStack() as running:

        def start(command: list[Any]) -> None:
            process = subprocess.Popen(
                [*map(str, command)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                stderr=sys.stderr,
            )
            running.callback(process.wait)
            running.callback(process.terminate)

        start(link)
        while flwr(environment, "supernode", "list", "rolora").returncode:
            time.sleep(0.5)
        for index, site in enumerate(sorted((federation / "sites").iterdir())):
            public = federation / "public" / f"{site.name}.pub"
            flwr(environment, "supernode", "register", str(public), "rolora").check_returncode()
            node = [programs / "flower-supernode", "--superlink", f"127.0.0.1:{port}"]
            node += ["--root-certificates", federation / "ca.crt", "--port", int(own) + 1 + index]
            node += ["--auth-supernode-private-key", _openssh(site / f"{site.name}.key")]
            start([*node, "--node-config", f'site="{site.name}"'])
        yield environment


def _openssh(key: Path) -> Path:
    """The same key in the format that SuperNodes read."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    target = key.with_suffix(".openssh")
    target.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    return target


def flwr(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Flower's command line."""
    command = [str(Path(sys.executable).parent / "flwr"), *words, "--format", "json"]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def main(job: str, federation: str, port: str, rounds: str, adapter: str, after: str) -> None:
    """Deploy, start the ServerApp, and pass requests on to it."""
    folder = Path(federation).resolve()
    os.environ |= {"JOB_FOLDER": job, "ADAPTER_FILE": adapter, "AFTER_ROUND": after}
    os.environ["CHANNEL"] = str(folder / "channel")
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    (app / "bench_apps.py").write_text(CODE)
    with deployed(folder, port) as environment, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ["CHANNEL"])
        listener.listen()
        listener.settimeout(120)
        begun = flwr(environment, "run", str(app), "rolora")
        if not json.loads(begun.stdout[begun.stdout.find("{") :])["success"]:
            raise RuntimeError(begun.stdout)
        connection, _ = listener.accept()
        channel = connection.makefile("rw")

        def run() -> Answer:
            started = time.time()
            print(rounds, file=channel, flush=True)
            answer = channel.readline()
            if not answer:
                raise RuntimeError("the ServerApp ended")
            clock = [started, time.time()]
            return {"units": int(rounds), "rounds": json.loads(answer), "clock": clock}

        serve(run)
        channel.close()
        connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
