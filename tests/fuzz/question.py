"""What a coordinator asks, as a site reads it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import Any

from calls import calls, configuration, make_place, remote

from fuzz import folder, with_head
from rolora.flower.message import REASONS, SiteMessage
from rolora.flower.versions import PROTOCOL
from rolora.sites.gate import ALWAYS, MAY_LEAVE
from rolora.sites.site import Site

ASKS = ("hello", "ready", "train", "score")
RESET = 500  # inputs until the site's folder is as at first: each question leaves something
_place = make_place(folder())
_settings = ("train.rounds=1", "eval.every=1", "data.client_test=0.3", "train.participation=1.0")
_transport = calls(_place, _place / "first", max_questions=10**9)
_run = remote(configuration(_place, *_settings), _place / "run", _transport)
for _ in _run.rounds():
    pass
_asked: dict[str, SiteMessage] = {
    str(question.head["ask"]): question
    for name, question, _ in _transport.passed
    if name == "site-ann"
}
USUAL: Mapping[str, Mapping[str, Any]] = {ask: _asked[ask].head for ask in ASKS}
_site = Site(_transport.sites[10].config.model_copy(update={"state": str(_place / "state")}))
_answered = 0
logging.getLogger("rolora").addHandler(logging.NullHandler())
logging.getLogger("rolora").propagate = False
SEEDS = [
    seed
    for number, ask in enumerate(ASKS)
    for seed in (
        bytes([number]),
        bytes([number]) + b'{"run": "0123456789abcdef", "round": 2}\n' + _asked[ask].body,
    )
]


def target(data: bytes) -> None:
    """The first byte says what is asked; the rest is the question (``with_head``)."""
    global _answered
    if not data:
        return
    if _answered % RESET == 0:
        shutil.rmtree(_site.config.folder, ignore_errors=True)
        shutil.copytree(_place / "first" / "ann", _site.config.folder)
        _site.opened = None
    _answered += 1
    ask = ASKS[data[0] % 4]
    head, body = with_head(data[1:], USUAL[ask])
    reply = _site.answer(SiteMessage(head, _asked[ask].body if body is None else body))
    assert (reply.head["site"], reply.head["protocol"]) == ("site-ann", PROTOCOL)
    if "error" in reply.head:
        assert reply.head.keys() == {"site", "protocol", "error"}
        assert reply.head["error"] in REASONS
        assert reply.head["error"] != "failed", reply.note
        assert not reply.body
    else:
        assert reply.head.keys() <= {*ALWAYS, *MAY_LEAVE[str(head["ask"])]}
