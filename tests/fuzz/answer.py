"""What a site answers, as the coordinator reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from calls import T, configuration, done, make_place

from fuzz import folder, with_head
from rolora.algorithm.adapter import Assignment, ClientInfo, Update
from rolora.algorithm.codec import encode
from rolora.algorithm.seeding import generator
from rolora.flower.engine import Remote
from rolora.flower.membership import Member, Membership
from rolora.flower.message import LABEL_LENGTH, LARGEST, SITE_NAME, SiteMessage
from rolora.flower.versions import PROTOCOL, versions
from rolora.model.base import layout, load_base, tokenizer_digest
from rolora.model.peft import LoraSettings
from rolora.run.experiment import Experiment

LABELS = ("bad", "cat", "good")
ASKS = ("hello", "ready", "train", "score")
_place = make_place(folder())
_experiment = Experiment(configuration(_place))
_base = load_base(
    "model",
    "classification",
    LoraSettings(rank=2, alpha=4, target_modules=("query", "value")),
    root=_place,
    labels=LABELS,
)
_method = _experiment.method
_received = _method.init(_base.specs, generator(0, "init"))
_assigned = Assignment(ClientInfo("ann", 9, 2, 1), _received)
_shared = _received.only(_method.shared(1))
_body, _ = encode("fp32", {n: t + 0.1 for n, t in _shared.items()}, _shared, {})
_own = {"site": "ann", "protocol": PROTOCOL}
USUAL: Mapping[str, Mapping[str, Any]] = {
    "hello": {**_own, **versions(), "num_examples": 9, "labels": json.dumps(LABELS)},
    "ready": {
        **_own,
        "base": _base.digest,
        "tokenizer": tokenizer_digest(_base),
        "layout": layout(_base),
        "num_examples": 9,
    },
    "train": {**_own, "round": 1, "num_examples": 9, "loss": 0.5, "steps": 2.0, "moved": 0.1},
    "score": {**_own, "round": 1, "metrics": '{"accuracy": 0.5, "loss": NaN}'},
}
SEEDS = [
    bytes([number]) + json.dumps({**USUAL[ask], "key": True}).encode() + end
    for number, ask in enumerate(ASKS)
    for end in (b"", b"\n" + _body)
] + [b"\x00" + text for text in (b'["good"]', b'{"labels": "[\\"a\\"]"}', b'{"error": "rows"}')]


@dataclass
class _Node:
    """A transport of one node, which answers one question as ``said`` and the others as usual."""

    asked: str
    said: SiteMessage

    def nodes(self) -> Sequence[int]:
        return [7]

    def ask(
        self, questions: Mapping[int, SiteMessage], seconds: float
    ) -> Iterator[tuple[int, SiteMessage]]:
        for node, question in questions.items():
            ask = str(question.head["ask"])
            yield node, self.said if ask == self.asked else SiteMessage(USUAL[ask])

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        return done(work)


def target(data: bytes) -> None:
    """The first byte says what was asked; the rest is the answer (``with_head``)."""
    if not data:
        return
    ask = ASKS[data[0] % 4]
    head, body = with_head(data[1:], USUAL[ask])
    said = SiteMessage(head, (_body if ask == "train" else b"") if body is None else body)
    told: list[str] = []
    membership = Membership(_Node(ask, said), _experiment, "0123456789abcdef", told.append)
    engine = Remote(membership, _experiment)
    if ask == "train":
        came = engine._update(_method, _assigned, said)
        if isinstance(came, Update):
            _sound(came)
        else:
            told.append(came.reason)
    elif ask == "score":
        membership.members["ann"] = Member(7, 9)
        known = {*_experiment.kind.metrics, *_experiment.kind.answers}
        for found in engine.evaluate(_method, [_assigned]):
            assert found.held_out.keys() <= known
            assert all(type(value) is float for value in found.held_out.values())
    else:
        membership.present(_base, LABELS)
        membership.present(_base, LABELS)  # takes what was answered since
        for hello in membership.hellos.values():
            assert SITE_NAME.fullmatch(hello.site)
            assert len(hello.labels) <= _experiment.config.federation.max_labels
            assert all(0 < len(label) <= LABEL_LENGTH for label in hello.labels)
        for member in membership.members.values():
            assert type(member.num_examples) is int
            assert 0 <= member.num_examples <= LARGEST
    for line in told:
        assert line.isprintable(), line
        assert len(line) < 500, line
        assert "its answer cannot be used (" not in line, line


def _sound(update: Update) -> None:
    assert update.adapter.keys() == _shared.keys()
    assert all(t.shape == _shared[n].shape for n, t in update.adapter.items())
    assert all(torch.isfinite(tensor).all() for tensor in update.adapter.values())
    assert all(type(value) is float for value in update.metrics.values())
