"""Sites that want to end the run, or to be taken for others: the honest ones never notice."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from calls import NAMES, Calls, T, calls, configuration, make_place, remote
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tiny import tiny_bert
from tiny_site import write_rows

from rolora.algorithm.adapter import tensor_hash
from rolora.flower import membership
from rolora.flower.membership import Unusable, attempt
from rolora.flower.message import (
    LABEL_LENGTH,
    MOST_LABELS,
    MessageError,
    SiteMessage,
    bounded,
    lost,
    read_json,
    read_labels,
    read_metrics,
)
from rolora.flower.transport import GridTransport, to_record
from rolora.flower.versions import PROTOCOL
from rolora.run.runs import Run
from rolora.sites.site import Site

pytestmark = pytest.mark.usefixtures("quick")

Bits = dict[str, str]
Spoil = Callable[[SiteMessage], SiteMessage]
SETTINGS = (
    "train.participation=1.0",
    "train.rounds=2",
    "federation.sites=2",
    "data.client_test=0.3",
    "eval.every=1",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("sites"))


def finished(run: Run) -> Bits:
    *_, last = run.rounds()
    return {name: tensor_hash(t) for name, t in last.state.server.adapter.items()}


@pytest.fixture(scope="module")
def honest_bits(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Bits:
    """The adapter of site-ann and site-bob alone."""
    out = tmp_path_factory.mktemp("honest")
    transport = calls(place, out / "sites")
    del transport.sites[12]
    return finished(remote(configuration(place, *SETTINGS), out / "run", transport))


def head(**changed: Any) -> Spoil:
    return lambda reply: replace(reply, head={**reply.head, **changed})


NINES = "9" * 400
ATTACKS: dict[str, tuple[str, Spoil]] = {
    "nested labels": ("hello", head(labels="[" * 100_000)),
    "labels of 400 digits": ("hello", head(labels=f"[{NINES}]")),
    "a number that is infinite": ("hello", head(labels="[1e999]")),
    "200,000 labels": ("hello", head(labels=json.dumps([str(n) for n in range(200_000)]))),
    "more labels than a site may have": (
        "hello",
        head(labels=json.dumps([f"{n}" for n in range(101)])),
    ),
    "a long label": ("hello", head(labels=json.dumps(["x" * 65]))),
    "a label that is half a letter": ("hello", head(labels='["\\ud800"]')),
    "a label that is measured": ("hello", head(labels='["1.5"]')),
    "labels in a table": ("hello", head(labels='{"good": 1}')),
    "nothing": ("hello", lambda reply: SiteMessage({})),
    "many keys": ("hello", head(**{f"key{n}": n for n in range(100)})),
    "a name that is a number": ("hello", head(site=7)),
    "a path as a name": ("hello", head(site="../ann")),
    "an error of commands": ("hello", lambda reply: SiteMessage({"error": "\x1b[2J\n" * 9999})),
    "a hash that is a number": ("ready", head(base=7)),
    "2^62 rows": ("ready", head(num_examples=2**62)),
    "rows that are a share": ("ready", head(num_examples=0.5)),
    "a loss in words": ("train", head(loss="low")),
    "a huge whole loss": ("train", head(loss=2**62)),
    "another count": ("train", head(num_examples=2**40)),
    "an empty answer": ("train", lambda reply: SiteMessage({})),
    "no body": ("train", lambda reply: replace(reply, body=b"")),
    "a long name": ("train", head(site="x" * 200_000)),
    "nested metrics": ("score", head(metrics='{"loss": ' * 5000)),
    "metrics of 400 digits": ("score", head(metrics=f'{{"loss": {NINES}}}')),
    "metrics in a list": ("score", head(metrics="[1]")),
    "a metric that is a list": ("score", head(metrics='{"loss": [1]}')),
    "a metric of another task": ("score", head(metrics='{"perplexity": 1}')),
    "a metric that is true": ("score", head(metrics='{"loss": true}')),
    "an error of evaluation": ("score", lambda reply: SiteMessage({"error": "x" * 200_000})),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_whatever_a_site_answers_the_honest_sites_run_ends_with_their_adapter(
    name: str, place: Path, tmp_path: Path, honest_bits: Bits
) -> None:
    asks, spoil = ATTACKS[name]

    def lie(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
        hostile = site == "site-cy" and question.head["ask"] == asks
        return spoil(reply) if hostile else reply

    transport = calls(place, tmp_path / "sites", lie)
    run = remote(configuration(place, *SETTINGS), tmp_path / "run", transport)
    if asks == "score":  # what it sent before is honest, and so is what it does not say
        *_, last = run.rounds()
        assert sorted(last.client_metrics) == ["site-ann", "site-bob"]
    else:
        assert finished(run) == honest_bits
    told = [line for line in transport.notified if "refused" in line or "not evaluated" in line]
    assert bool(told) == (asks != "train")
    assert all(len(line) < 400 and line.isprintable() for line in told)


def test_a_site_that_is_refused_has_added_no_label(
    place: Path, tmp_path: Path, honest_bits: Bits
) -> None:
    write_rows(tmp_path / "rows.csv", 20)
    more = (tmp_path / "rows.csv").read_text().replace("cat\n", "dog\n")
    (tmp_path / "rows.csv").write_text(more)
    other = tiny_bert(tmp_path / "other", seed=1)
    transport = calls(place, tmp_path / "sites")
    config = transport.sites[12].config
    changed = {"data": str(tmp_path / "rows.csv"), "model": str(other)}
    transport.sites[12] = Site(config.model_copy(update=changed))
    settings = [*SETTINGS, "federation.sites=3"]
    run = remote(configuration(place, *settings), tmp_path / "run", transport)
    assert run.experiment.labels == ("bad", "cat", "good")
    assert finished(run) == honest_bits


def test_a_site_with_a_label_that_the_coordinator_did_not_name_is_refused(
    place: Path, tmp_path: Path, honest_bits: Bits
) -> None:
    def more(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
        hostile = site == "site-cy" and question.head["ask"] == "hello"
        return head(labels='["bad", "worse"]')(reply) if hostile else reply

    transport = calls(place, tmp_path / "sites", more)
    settings = [*SETTINGS, 'federation.labels=["good", "cat", "bad"]']
    run = remote(configuration(place, *settings), tmp_path / "run", transport)
    assert finished(run) == honest_bits
    assert any("label 'worse' is not in federation.labels" in line for line in transport.notified)


def named(transport: Calls, node: int, name: str) -> Calls:
    """The transport with another name in the site.toml of this node."""
    config = transport.sites[node].config
    transport.sites[node] = Site(config.model_copy(update={"name": name}))
    return transport


def test_a_key_joins_by_the_name_that_it_was_registered_for_and_no_other(
    place: Path, tmp_path: Path, honest_bits: Bits
) -> None:
    transport = named(calls(place, tmp_path / "sites"), 12, "site-ann")
    keys = {10 + number: f"site-{name}" for number, name in enumerate(NAMES)}
    run = remote(configuration(place, *SETTINGS), tmp_path / "run", transport, keys)
    assert finished(run) == honest_bits
    (said,) = (line for line in transport.notified if "refused" in line)
    assert "it calls itself 'site-ann', but its key is that of 'site-cy'" in said


def test_a_node_whose_key_has_no_name_is_asked_nothing(
    place: Path, tmp_path: Path, honest_bits: Bits
) -> None:
    transport = calls(place, tmp_path / "sites")
    keys = {10: "site-ann", 11: "site-bob"}
    run = remote(configuration(place, *SETTINGS), tmp_path / "run", transport, keys)
    assert finished(run) == honest_bits
    assert "site-cy" not in {name for name, _, _ in transport.passed}


def test_without_keys_a_name_stays_with_the_node_that_had_it_first(
    place: Path, tmp_path: Path, honest_bits: Bits
) -> None:
    transport = calls(place, tmp_path / "sites")
    third = transport.sites.pop(12)
    run = remote(configuration(place, *SETTINGS), tmp_path / "run", transport)
    named(Calls({12: third}), 12, "site-ann")
    transport.sites[12] = Site(third.config.model_copy(update={"name": "site-ann"}))
    assert finished(run) == honest_bits
    assert any("another site of this name is connected" in line for line in transport.notified)


@dataclass
class Silent(Calls):
    """``site-cy`` never answers one of the questions."""

    to: str = "hello"

    def ask(
        self, questions: Mapping[int, SiteMessage], seconds: float
    ) -> Iterator[tuple[int, SiteMessage]]:
        silent = {
            n for n, question in questions.items() if n == 12 and self.to == question.head["ask"]
        }
        yield from super().ask({n: q for n, q in questions.items() if n not in silent}, seconds)
        for node in silent:
            self.waited.append(seconds)
            yield node, lost("no answer before the deadline")

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        waited = len(self.waited)
        future = super().in_background(work)
        self.aside += self.waited[waited:]
        del self.waited[waited:]
        return future

    def __post_init__(self) -> None:
        self.waited, self.aside = list[float](), list[float]()


@pytest.mark.parametrize(
    ("to", "waited", "aside"),
    [("hello", [700], [700]), ("ready", [700], [700]), ("train", [900, 900], [])],
)
def test_the_others_wait_for_a_silent_site_once_at_the_start_and_twice_in_a_round(
    to: str, waited: list[int], aside: list[int], place: Path, tmp_path: Path
) -> None:
    transport = Silent(calls(place, tmp_path / "sites").sites, to=to)
    settings = [*SETTINGS, "train.rounds=6", "federation.join=700", "federation.deadline=900"]
    *_, last = remote(configuration(place, *settings), tmp_path / "run", transport).rounds()
    assert sorted(last.cohort) == ["site-ann", "site-bob"]
    assert [pytest.approx(wait, abs=100) for wait in waited] == transport.waited
    assert aside == transport.aside


def test_each_silence_is_followed_by_a_longer_pause_until_the_site_has_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    wanted = SimpleNamespace(config=configuration(place, "federation.join=10"))
    sites = membership.Membership(cast("Any", None), cast("Any", wanted), "", print)
    pauses = []
    for _ in range(4):
        sites.missed(3)
        pauses.append(sites.silences[3].until - 1000)
    assert pauses == [0, 10, 30, 70]
    sites.members["ann"] = membership.Member(3, 9)
    sites.trained("ann")
    sites.missed(3)
    assert sites.silences[3].until == 1000
    assert sites.members == {}


class Grid:
    """A grid on which node 1 answers well, 2 what cannot be read, 3 no record, 4 lists."""

    def push_messages(self, messages: Any) -> list[str]:
        return [str(message.metadata.dst_node_id) for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        if "2" in ids:
            raise ValueError("bad object")
        contents = {
            "1": to_record(SiteMessage({"n": 1})),
            "3": RecordDict({"rolora": MetricRecord({"n": 1})}),
            "4": RecordDict({"rolora": ConfigRecord({"n": [1, 2], "body": "text"})}),
            "5": None,
        }
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=id),
                content=contents[id],
                has_error=lambda: False,
            )
            for id in ids
        ]


def test_an_answer_that_flower_cannot_read_is_its_node_s_loss_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    questions = dict.fromkeys(range(1, 6), SiteMessage({"ask": "train"}))
    answers = dict(GridTransport(cast("Any", Grid())).ask(questions, 5))
    assert answers[1] == SiteMessage({"n": 1})
    assert "not a message" in str(answers[2].head["error"])
    assert answers[3] == answers[4] == SiteMessage({})
    assert "not a message" in str(answers[5].head["error"])


def test_what_an_answer_sets_off_is_one_short_printable_line() -> None:
    def fails(reply: SiteMessage) -> int:
        raise errors.pop()

    good = SiteMessage({"protocol": PROTOCOL})
    errors: list[Exception] = [RecursionError(), OverflowError(), MessageError("\x1b" * 999)]
    while errors:
        found = attempt(fails, good)
        assert isinstance(found, Unusable)
        assert found.reason.isprintable()
        assert len(found.reason) < 1300


@pytest.mark.parametrize(
    "text",
    [
        "[" * 9 + "]" * 9,
        '{"a": 1, "a": 2}',
        "9" * 18,
        "-" + "9" * 400,
        "1e400",
        "0." + "1" * 400,
        '"\\ud800"',
        "[1, 2",
        "",
    ],
)
def test_json_that_is_deep_huge_or_ambiguous_is_refused(text: str) -> None:
    with pytest.raises(MessageError):
        read_json(text, 1000)
    with pytest.raises(MessageError):
        read_json("[1]", 2)


def test_json_within_bounds_is_read_as_it_is() -> None:
    text = '{"a[{": [1, -2.5, "]]]]]]]]]]", NaN, true, null], "b": 9007199254740992}'
    found = read_json(text, 1000)
    assert found["b"] == 2**53
    assert found["a[{"][:3] == [1, -2.5, "]]]]]]]]]]"]
    assert read_metrics('{"loss": NaN, "accuracy": 1}', {"loss", "accuracy"})["accuracy"] == 1.0


@pytest.mark.parametrize(
    "labels",
    [["x" * (LABEL_LENGTH + 1)], [str(n) for n in range(MOST_LABELS + 1)], ["a", "a"], [""], [1]],
)
def test_labels_are_few_short_texts_and_distinct(labels: list[Any]) -> None:
    with pytest.raises(MessageError):
        read_labels(json.dumps(labels))


def test_a_head_is_a_few_short_plain_values() -> None:
    assert bounded({"n": 1, "x": float("nan")}).integer("n") == 1
    for head in (
        {f"k{n}": 1 for n in range(33)},
        {"a b": 1},
        {"x" * 65: 1},
        {"n": [1]},
        {"n": None},
        {"n": 2**53 + 1},
        {"n": "x" * 300_001},
        {"n": "\ud800"},
    ):
        with pytest.raises(MessageError):
            bounded(head)


def test_records_that_are_anything_fail_alone_in_flower_s_strategy() -> None:
    from rolora.flower.records import comparable, update_in

    class Odd:
        """A content whose every look raises."""

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    about = SimpleNamespace(src_node_id=7)
    reply = SimpleNamespace(metadata=about, content=Odd(), has_error=lambda: False)
    assert (
        "RuntimeError"
        in cast("Any", update_in(cast("Any", reply), *2 * (cast("Any", {}),), "n")).reason
    )
    good = RecordDict({"m": MetricRecord({"n": 1, "loss": 0.5}), "a": ArrayRecord({})})
    assert comparable([Odd(), good], "n") == [good]


# a message by itself


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: SiteMessage({"x": 3}).text("x"), "'x' is 3, expected a string"),
        (lambda: SiteMessage({}).text("x"), "'x' is None, expected a string"),
        (lambda: SiteMessage({"x": "3"}).number("x"), "'x' is '3', expected a finite number"),
        (lambda: SiteMessage({"x": True}).number("x"), "'x' is True, expected a finite number"),
        (lambda: SiteMessage({"x": math.nan}).number("x"), "'x' is nan, expected a finite number"),
        (lambda: SiteMessage({"x": -1}).integer("x"), "'x' is -1, expected an integer of at least"),
        (lambda: SiteMessage({"x": 1.0}).integer("x"), "'x' is 1.0, expected an integer of at lea"),
        (lambda: read_json("[9007199254740993]", 99), "JSON with a whole number beyond 2^53"),
        (lambda: read_json("[-9007199254740993]", 99), "JSON with a whole number beyond 2^53"),
        (lambda: read_json("[" + 5000 * "9" + "]", 9999), "it is not valid JSON"),
        (lambda: read_metrics("[]", {"loss"}), "'metrics' is not a table of this task's metrics"),
        (lambda: read_metrics('{"x": 1}', {"loss"}), "'metrics' is not a table of this task's"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_as_what_it_is(
    read: Callable[[], object], said: str
) -> None:
    with pytest.raises(MessageError, match=re.escape(said)):
        read()
