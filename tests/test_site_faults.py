"""Answers that cannot be used, sites that are away, and sites that are refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from calls import Calls, calls, configuration, make_place, remote
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from lying_site import LIES, before
from tiny import tiny_bert
from tiny_site import write_rows
from transformers import AutoTokenizer

from rolora.errors import NoQuorum
from rolora.flower.message import MessageError, SiteMessage, compress_names, expand_names, lost
from rolora.flower.transport import GridTransport, to_record
from rolora.run.experiment import Experiment
from rolora.sites.site import Site

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("sites"))


def changed(site: Site, **fields: Any) -> Site:
    return Site(site.config.model_copy(update=fields))


def test_every_lie_is_rejected_with_its_reason_and_the_others_are_used(
    place: Path, tmp_path: Path
) -> None:
    lies = list(LIES.values())

    def lie(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
        if site != "site-cy" or question.head["ask"] != "train":
            return reply
        round = question.integer("round")
        told = lies[round - 1][1](reply) if round <= len(lies) else reply
        before["reply"] = reply
        return told

    rounds = len(lies) + 1
    config = configuration(place, "train.participation=1.0", f"train.rounds={rounds}")
    results = list(remote(config, tmp_path / "run", calls(place, tmp_path, lie)).rounds())[1:]
    assert len(results) == rounds
    for result, (name, (said, _)) in zip(results[:-1], LIES.items(), strict=True):
        assert said in {**result.missing, **result.rejected}["site-cy"], name
        assert sorted(result.clients) == ["site-ann", "site-bob"]
    assert results[-1].rejected == {}
    assert len(results[-1].clients) == 3


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("rounds later", "it is for round"),
        ("the other factor", "header is not that"),
        ("nothing", "out of reach"),
    ],
)
def test_an_answer_of_another_round_or_phase_is_never_averaged(
    of: str, said: str, place: Path, tmp_path: Path
) -> None:
    first: dict[str, SiteMessage] = {}

    def late(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
        if site != "site-bob" or question.head["ask"] != "train":
            return reply
        old = first.setdefault("reply", reply)
        if question.integer("round") != 2:
            return reply
        if of == "nothing":
            return SiteMessage({"error": "out of reach"})
        head = old.head if of == "rounds later" else {**old.head, "round": 2}
        return replace(old, head=head)

    config = configuration(place, "train.participation=1.0", "train.rounds=3")
    _, _, second, third = remote(config, tmp_path / "run", calls(place, tmp_path, late)).rounds()
    unused = second.missing if of == "nothing" else second.rejected
    assert said in unused["site-bob"]
    assert "site-bob" in third.clients


class Grid:
    """A grid on which node 1 answers twice, a stranger once, node 2 never; node 3 is not there."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [
            "" if m.metadata.dst_node_id == 3 else f"to {m.metadata.dst_node_id}" for m in messages
        ]

    def pull_messages(self, ids: Iterable[str]) -> Iterable[Any]:
        assert "" not in ids
        return [self.reply("to 1", n=1), self.reply("to 1", n=2), self.reply("to 9", n=1)]

    def reply(self, to: str, **head: int) -> Any:
        content = to_record(SiteMessage(head))
        about = SimpleNamespace(reply_to_message_id=to)
        return SimpleNamespace(metadata=about, content=content, has_error=lambda: False)


def test_the_first_of_two_answers_counts_and_a_missing_one_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    question = SiteMessage({"ask": "train"})
    transport = GridTransport(cast("Any", Grid()))
    late = lost("no answer before the deadline")
    asked = transport.ask(dict.fromkeys((1, 2, 3), question), seconds=0.3)
    assert list(asked) == [(1, SiteMessage({"n": 1})), (2, late), (3, late)]
    assert list(transport.ask({1: question}, seconds=0)) == [(1, late)]


def test_an_answer_that_is_announced_and_never_sent_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flower's pull waits for it, longer than the deadline."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    given_up = threading.Event()

    class Held(Grid):
        def pull_messages(self, ids: Iterable[str]) -> Iterable[Any]:
            if ids == ["to 1"]:
                assert given_up.wait(20), "the others were not served meanwhile"
                return []
            return [self.reply("to 2", n=2)]

    transport = GridTransport(cast("Any", Held()))
    asked = transport.ask(dict.fromkeys((1, 2), SiteMessage({"ask": "train"})), seconds=1.5)
    assert next(asked) == (2, SiteMessage({"n": 2}))
    assert list(asked) == [(1, lost("no answer before the deadline"))]
    given_up.set()


@pytest.mark.parametrize("differs", ["base model", "tokenizer"])
def test_a_site_with_another_model_is_refused_by_hash_and_the_others_go_on(
    differs: str, place: Path, tmp_path: Path
) -> None:
    other = tiny_bert(tmp_path / "other", seed=int(differs == "base model"))
    if differs == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["hearts"])
        tokenizer.save_pretrained(other)
    transport = calls(place, tmp_path)
    transport.sites[12] = changed(transport.sites[12], model=str(other))
    *_, last = remote(configuration(place, "train.rounds=2"), tmp_path / "run", transport).rounds()
    (told,) = [line for line in transport.notified if "refused" in line]
    assert f"site site-cy is refused: it has another {differs}" in told
    assert "the coordinator's is" in told
    assert set(last.cohort) <= {"site-ann", "site-bob"}


def test_a_site_whose_operator_gave_no_column_the_role_of_label_takes_no_part(
    place: Path, tmp_path: Path
) -> None:
    transport = calls(place, tmp_path)
    transport.sites[12] = changed(transport.sites[12], label=None)
    with pytest.raises(NoQuorum, match=r"its operator has given no column a role"):
        remote(configuration(place, "federation.wait=0.1"), tmp_path / "run", transport)


def test_a_label_that_only_one_site_has_is_learned_by_all(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", 9, ["good", "bad", "cat", "dog"][:3])
    transport = calls(place, tmp_path)
    for node, label in ((10, "good"), (11, "bad"), (12, "cat")):
        write_rows(tmp_path / f"{label}.csv", 8, [label])
        transport.sites[node] = changed(transport.sites[node], data=str(tmp_path / f"{label}.csv"))
    run = remote(configuration(place, "train.rounds=1"), tmp_path / "run", transport)
    assert run.experiment.labels == ("bad", "cat", "good")


def test_sites_and_one_machine_find_the_same_labels_however_each_file_writes_numbers(
    place: Path, tmp_path: Path
) -> None:
    """One machine reads the three files as one, where a site knows only its own."""
    transport = calls(place, tmp_path)
    (tmp_path / "rows").mkdir()
    labels: dict[int, list[Any]] = {10: [1, 2], 11: ["1", "2", "?"], 12: [1.0, 10]}
    for node, own in labels.items():
        file = tmp_path / "rows" / f"{node}.jsonl"
        lines = [json.dumps({"text": "a good film", "label": label}) for label in own * 4]
        file.write_text("\n".join(lines))
        transport.sites[node] = changed(transport.sites[node], data=str(file))
    (tmp_path / "test.csv").write_text("text,label\na good film,1\na bad film,?\n")
    test = f"data.test={tmp_path / 'test.csv'}"
    run = remote(configuration(place, "train.rounds=1", test), tmp_path / "run", transport)
    files = [f"data.train={tmp_path / 'rows' / '*.jsonl'}", "partition.scheme=files"]
    alone = Experiment(configuration(place, test, *files))
    assert run.experiment.labels == alone.labels == ("1", "2", "10", "?")


def test_too_few_sites_for_a_quorum_are_waited_for_and_then_given_up(
    place: Path, tmp_path: Path
) -> None:
    transport = calls(place, tmp_path)
    config = configuration(
        place, "train.participation=1.0", "aggregate.quorum=2", "federation.wait=1.5"
    )
    rounds = remote(config, tmp_path / "run", transport).rounds()
    next(rounds), next(rounds)
    transport.away = {"site-ann", "site-bob"}
    with pytest.raises(NoQuorum, match="1 sites are connected, too few for a cohort of 2"):
        next(rounds)


def test_of_a_cohort_with_a_spare_site_the_first_to_answer_are_used(
    place: Path, tmp_path: Path
) -> None:
    config = configuration(place, "train.rounds=3", "federation.spare=1")
    results = list(remote(config, tmp_path / "run", calls(place, tmp_path)).rounds())[1:]
    for result in results:
        assert len(result.cohort) == 3
        assert len(result.clients) == 2
        assert result.rejected == {}
        (reason,) = result.missing.values()
        assert reason.startswith("not needed")


def test_a_spare_site_stands_in_for_one_that_fails(place: Path, tmp_path: Path) -> None:
    def fails(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
        train = question.head["ask"] == "train"
        return SiteMessage({"error": "gone"}) if site == "site-cy" and train else reply

    config = configuration(place, "train.rounds=2", "federation.spare=1")
    transport: Calls = calls(place, tmp_path, fails)
    results = list(remote(config, tmp_path / "run", transport).rounds())[1:]
    assert [sorted(result.clients) for result in results] == [["site-ann", "site-bob"]] * 2


def test_names_travel_as_roles_where_that_says_it_all() -> None:
    everything = [
        "q.lora_A.weight",
        "q.lora_B.weight",
        "v.lora_A.weight",
        "v.lora_B.weight",
        "head",
    ]
    assert compress_names(everything[:3:2], everything) == '["A"]'
    for chosen in (everything, everything[:3:2], everything[:1], everything[1:3], []):
        text = compress_names(chosen, everything)
        assert sorted(expand_names(text, everything)) == sorted(chosen)
    for wrong in ('["C"]', '"A"', "7", "{", '[["A"]]', '["q.lora_A"]'):
        with pytest.raises(MessageError, match="does not select tensors"):
            expand_names(wrong, everything)
