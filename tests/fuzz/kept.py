"""Files of JSON that a run, a federation and a site keep: half written, or edited by somebody."""

from __future__ import annotations

import json
import math
import shutil

import torch
from calls import configuration

from fuzz import folder
from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.ledger import Held, Ledger
from rolora.algorithm.method import ServerState
from rolora.errors import RoloraError
from rolora.flower.message import SITE_NAME
from rolora.run.folder import RunFolder
from rolora.sites.folder import FederationFolder
from rolora.sites.policy import Refused, Uses
from rolora.sites.site_config import SiteConfig
from rolora.training.rounds import Best, RoundResult, RunState

_here = folder()
_A, _B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
_layer = "base_model.model.q"
_adapter = AdapterState({_A: torch.ones(2, 3), _B: torch.ones(3, 2)}, {_layer: 2.0})
START = RunState(ServerState(_adapter))


_state = RunState(
    ServerState(_adapter, memory={_B: torch.zeros(3, 2)}, round=1),
    Ledger({_A: 1}, {"ann": Held(1, False, 1)}),
    Best(1, 0.5, _adapter),
)
_first = RunFolder.create(_here / "first", "", {}, {})
_first.commit(RoundResult(0, 0, START))
_first.commit(RoundResult(1, 0, _state, clients={"ann": {"loss": 1.0, "num_examples": 3}}))
_run = RunFolder(_here / "run")
_federation = FederationFolder(_here / "federation", "localhost", 9092)
_federation.path.mkdir()
(_federation.path / "state.db").touch()
_site = SiteConfig(name="ann", data="rows.csv", state="site", root=_here)
_site.folder.mkdir()
_config = configuration(_here, "data.client_test=0.3")

SEEDS = [
    b"\x00" + (_first.path / "checkpoints" / "round-000001" / "manifest.json").read_bytes(),
    b"\x01" + json.dumps({"ann": "12345678901234567890", "bob": "7"}).encode(),
    b"\x02" + json.dumps({"0123456789abcdef": {"share": 0.3, "seed": 0, "questions": 7}}).encode(),
    b"\x02" + json.dumps({"abcdef0123456789": {"share": 0.0, "seed": 0, "questions": 1}}).encode(),
]


def target(data: bytes) -> None:
    """The first byte says which file the rest is: manifest.json, nodes.json or uses.json."""
    if data:
        (_manifest, _nodes, _uses)[data[0] % 3](data[1:])


def _manifest(data: bytes) -> None:
    shutil.rmtree(_run.path, ignore_errors=True)
    shutil.copytree(_first.path, _run.path)
    (_run.path / "checkpoints" / "round-000001" / "manifest.json").write_bytes(data)
    try:
        state, notes = _run.restore(START)
    except RoloraError:
        return
    if notes:  # it goes on from the checkpoint before, and says so
        return
    server, ledger, best = state.server, state.ledger, state.best
    assert (server.round, server.attempt, state.stale) == (1, 0, 0)
    assert server.adapter.scaling == _adapter.scaling
    assert (ledger, best) == (_state.ledger, _state.best)


def _nodes(data: bytes) -> None:
    (_federation.path / "nodes.json").write_bytes(data)
    try:
        names = _federation.names()
    except RoloraError:
        return
    for node, name in names.items():
        assert type(node) is int
        assert SITE_NAME.fullmatch(name)


def _uses(data: bytes) -> None:
    file = _site.folder / "uses.json"
    file.write_bytes(data)
    try:
        uses = Uses.read(_site)
        for use in uses.runs.values():
            assert 0 <= use.share < 1
            assert math.isfinite(use.share)
            assert type(use.seed) is type(use.questions) is int
        uses.admit("0123456789abcdef", _config, 40)
    except Refused:
        return
    assert Uses.read(_site).runs == uses.runs
