"""A coordinator that wants to see rows: what a site answers, logs and counts, and what it refuses.

Each row holds a canary; nothing that leaves the site, and no line of its log, may hold one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calls import configuration, wired
from tiny import tiny_bert

from rolora.config.schema import RunConfig
from rolora.flower.message import REASONS, SiteMessage, read_metrics
from rolora.flower.versions import PROTOCOL
from rolora.sites.gate import leave
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig

ROWS = 40
CANARY = "canary-7c1f"
RUN = "0123456789abcdef"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    tiny_bert(folder / "model")
    lines = [
        {"text": f"{CANARY} film {n}", "label": ["bad", "good"][n % 2], "id": f"{CANARY}-{n}"}
        for n in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class Asked:
    """A site, asked by hand; everything that it answered."""

    def __init__(self, place: Path, state: Path, **policy: Any) -> None:
        given = {"text": "text", "label": "label", "min_train_rows": 8, **policy}
        self.config = SiteConfig(
            name="ann", data="rows.jsonl", state=str(state), root=place, **given
        )
        self.place, self.answers = place, list[SiteMessage]()
        self.site = Site(self.config)

    def ask(self, ask: str, body: bytes = b"", run: str = RUN, **head: Any) -> SiteMessage:
        question = SiteMessage({"ask": ask, "protocol": PROTOCOL, "run": run, **head}, body)
        self.answers.append(wired(self.site.answer(question)))
        return self.answers[-1]

    def hello(self, *overrides: str, run: str = RUN) -> SiteMessage:
        return self.ask("hello", dumped(configuration(self.place, *overrides)), run)

    def told(self) -> str:
        """Everything that left and everything that was logged, as one text."""
        log = self.config.folder / "outgoing.log"
        sent = [f"{dict(one.head)} {one.body!r}" for one in self.answers]
        return "\n".join([*sent, log.read_text()])


def dumped(config: RunConfig) -> bytes:
    return config.model_dump_json(exclude_none=True).encode()


@pytest.fixture
def asked(place: Path, tmp_path: Path) -> Iterator[Asked]:
    opened = Asked(place, tmp_path / "state")
    yield opened
    assert CANARY not in opened.told()


@pytest.mark.parametrize(
    ("override", "policy"),
    [
        ("data.label=text", {}),
        ("data.label=id", {}),
        ("data.text=id", {}),
        ('data.text=["text", "id"]', {}),
    ],
)
def test_a_run_that_names_columns_is_given_those_that_the_operator_named(
    override: str, policy: dict[str, Any], asked: Asked
) -> None:
    answer = asked.hello(override)
    assert json.loads(answer.text("labels")) == ["bad", "good"]
    assert asked.ask("ready", b'["bad", "good"]').integer("num_examples") == ROWS
    run = asked.site.opened
    assert run is not None
    assert run.experiment.rows.train.column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("code", "overrides", "policy"),
    [
        ("role", (), {"text": None}),
        ("role", (), {"label": None}),
        ("task", ("model.task=multi_label",), {}),
        ("task", ("model.task=regression",), {}),
        ("role", ("model.task=causal_lm", "data.prompt=text", "data.completion=id"), ALLOWED := {
            "tasks": ["classification", "causal_lm"]
        }),
        ("role", ("model.task=causal_lm", "data.messages=text"), ALLOWED),
        ("config", (
            *("model.task=preference", "data.prompt=text", "data.chosen=label"),
            *("data.rejected=id", "lora.init_from=/elsewhere"),
        ), {"tasks": ["preference"], "prompt": "text", "chosen": "label", "rejected": "id"}),
        ("labels", (), {"label": "id", "max_labels": 39}),
        ("labels", (), {"labels": ["bad"]}),
        ("data", (), {"label": "nowhere"}),
        ("rows", ("data.client_test=0.999",), {}),
        ("rows", ("data.client_test=0.03",), {}),
        ("rows", ("train.batch_size=1",), {"min_train_rows": 3}),
        ("limit", ("train.rounds=7",), {"max_rounds": 6}),
        ("limit", ("train.local_steps=1000000000000",), {}),
        ("limit", ("train.local_steps=4",), {"max_steps": 3}),
        ("limit", ("train.batch_size=9",), {"max_batch": 8}),
        ("limit", ("lora.rank=1000000000",), {}),
        ("limit", ("lora.rank=[2, 5]",), {"max_rank": 4}),
        ("limit", ('lora.rank={"*" = 5}',), {"max_rank": 4}),
    ],
)  # fmt: skip
def test_what_the_operator_has_not_agreed_to_is_refused_by_a_code_and_nothing_else(
    code: str, overrides: tuple[str, ...], policy: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    asked = Asked(place, tmp_path / "state", **policy)
    answer = asked.hello(*overrides)
    assert dict(answer.head) == {"site": "ann", "protocol": PROTOCOL, "error": code}
    assert answer.body == b""
    assert code in REASONS
    assert CANARY not in asked.told()
    assert not (tmp_path / "state" / RUN).exists()


def test_a_question_that_makes_a_library_quote_a_row_is_answered_by_a_code(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(place, tmp_path / "state")
    asked.hello()
    for error in (ValueError, KeyError, MemoryError, RecursionError, OSError):

        def quotes(*_: Any, error: type[Exception] = error) -> Any:
            raise error(f"cannot use {CANARY}")

        monkeypatch.setattr("rolora.sites.site.experiment_here", quotes)
        code = asked.ask("ready", b'["bad", "good"]').head["error"]
        assert code == ("disk" if error is OSError else "failed")
    assert CANARY not in asked.told()


def test_the_log_lists_every_value_that_left_and_counts_its_bytes(asked: Asked) -> None:
    asked.hello()
    asked.hello("data.label=nowhere", "model.task=regression")
    entries = [json.loads(line) for line in asked.told().splitlines()[-2:]]
    for entry, answer in zip(entries, asked.answers, strict=True):
        assert entry["left"] == dict(answer.head)
        text = "".join(f"{key}{value}" for key, value in answer.head.items())
        assert entry["bytes"] == len(text) + len(answer.body) > 0
    assert entries[0]["left"]["labels"] == '["bad", "good"]'


@pytest.mark.parametrize(
    ("asks", "reply"),
    [
        ("hello", SiteMessage({"text": CANARY})),
        ("ready", SiteMessage({"num_examples": 3}, CANARY.encode())),
        ("train", SiteMessage({"loss": CANARY})),
        ("score", SiteMessage({"error": CANARY})),
        ("score", SiteMessage({"error": "failed", "round": 1})),
        ("else", SiteMessage({"num_examples": 3})),
    ],
)
def test_nothing_passes_the_gate_that_is_no_known_part_of_an_answer(
    asks: str, reply: SiteMessage, asked: Asked
) -> None:
    assert leave(asked.config, asks, RUN, reply).head["error"] == "failed"


def test_only_the_metrics_that_the_operator_named_leave(asked: Asked) -> None:
    found = {"accuracy": 0.5, "loss": 1.0, CANARY: 0.0}
    reply = SiteMessage({"round": 1, "metrics": json.dumps(found)})
    every = leave(asked.config, "score", RUN, reply)
    assert json.loads(every.text("metrics")) == {"accuracy": 0.5, "loss": 1.0}
    fewer = asked.config.model_copy(update={"metrics": ["accuracy"]})
    assert json.loads(leave(fewer, "score", RUN, reply).text("metrics")) == {"accuracy": 0.5}
    assert read_metrics(every.text("metrics"), {"accuracy", "loss"}) == {"accuracy": 0.5, "loss": 1}


def test_the_training_loss_leaves_only_if_the_operator_named_it(asked: Asked) -> None:
    reply = SiteMessage({"round": 1, "num_examples": 40, "loss": 0.7131971, "moved": 1.0}, b"x")
    for metrics, leaves in ((None, True), (["accuracy", "loss"], True), (["accuracy"], False)):
        (asked.config.folder / "outgoing.log").unlink(missing_ok=True)
        site = asked.config.model_copy(update={"metrics": metrics})
        left = leave(site, "train", RUN, reply)
        assert ("loss" in left.head) == leaves
        assert ("0.7131971" in asked.told()) == leaves
        assert (left.head["moved"], left.body) == (1.0, b"x")


def test_an_answer_that_cannot_be_logged_does_not_leave(place: Path, tmp_path: Path) -> None:
    asked = Asked(place, tmp_path / "state")
    (tmp_path / "state" / "outgoing.log").mkdir(parents=True)
    assert dict(asked.hello().head) == {"site": "ann", "protocol": PROTOCOL, "error": "disk"}


def test_two_runs_may_not_hold_out_nearly_the_same_rows(asked: Asked) -> None:
    codes = [
        asked.hello(f"data.client_test={share}", f"seed={seed}", run=f"{number:08x}").head.get(
            "error"
        )
        for number, (share, seed) in enumerate(
            [(0.5, 1), (0.525, 1), (0.5, 1), (0.475, 1), (0.3, 1)]
        )
    ]
    assert codes == [None, "split", None, "split", "split"]
    assert asked.hello("data.client_test=0.5", "seed=4", run=f"{9:08x}").head.get("error") is None
    changed = asked.hello("data.client_test=0.5", "seed=5", run=f"{9:08x}")
    assert changed.head["error"] == "split"


def test_runs_and_questions_are_counted_across_restarts_and_a_resumed_run_once(
    place: Path, tmp_path: Path
) -> None:
    policy = {"max_runs": 2, "max_questions": 3}

    def restarted() -> Asked:
        return Asked(place, tmp_path / "state", **policy)

    assert "error" not in restarted().hello(run="a" * 8).head
    assert "error" not in restarted().hello(run="b" * 8).head
    assert restarted().hello(run="c" * 8).head["error"] == "limit"
    assert "error" not in restarted().hello(run="a" * 8).head
    assert "error" not in restarted().ask("ready", b'["bad", "good"]', run="a" * 8).head
    assert restarted().hello(run="a" * 8).head["error"] == "limit"
    assert restarted().ask("ready", b"[]", run="a" * 8).head["error"] == "limit"
    assert "error" not in restarted().hello(run="b" * 8).head
    use = '{"share": 0.0, "seed": 0, "questions": 0}'
    for text in (
        "{",
        "[]",
        "[" * 100_000,
        f'{{"{"b" * 8}": {{}}}}',
        f'{{"{"b" * 8}": {use.replace("0}", "-5}")}}}',
        f'{{"{"b" * 8}": {use.replace("0.0", "NaN")}}}',
        f'{{"{"b" * 8}": {use.replace("0.0", "1e9")}}}',
        f'{{"{"b" * 8}": {use.replace(": 0,", ": true,")}}}',
    ):
        (tmp_path / "state" / "uses.json").write_text(text)
        assert restarted().hello(run="b" * 8).head["error"] == "disk", text


def test_a_run_that_was_not_admitted_is_answered_nothing(asked: Asked) -> None:
    for ask in ("ready", "train", "score"):
        assert asked.ask(ask, b"[]", round=1).head["error"] == "question"
    assert asked.ask("give", b"[]").head["error"] == "question"
    assert asked.ask("hello", b"{}", run="../../etc").head["error"] == "question"


def test_an_admitted_run_is_answered_only_known_questions_of_this_protocol(asked: Asked) -> None:
    asked.hello()
    assert asked.ask("give", b"[]").head["error"] == "question"
    assert asked.ask("hello", protocol=PROTOCOL + 1).head["error"] == "protocol"


def test_a_list_of_labels_that_is_damaged_on_the_site_s_disk_is_not_used(asked: Asked) -> None:
    asked.hello()
    assert "error" not in asked.ask("ready", b'["bad", "good"]').head
    (asked.config.folder / RUN / "labels.json").write_text('["bad", "bad"]')
    assert asked.ask("train", round=1, last=0).head["error"] == "question"


def test_a_round_beyond_those_allowed_is_refused(place: Path, tmp_path: Path) -> None:
    asked = Asked(place, tmp_path / "state", max_rounds=6)
    asked.hello()
    assert asked.ask("train", round=7).head["error"] == "limit"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 400 + b"}",
        b'{"train": {"lr": 1e999}}',
        b'{"name": "\\ud800"}',
        b'{"name": "a", "name": "b"}',
        b" " * (2**20 + 1),
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_configuration_or_list_that_is_malformed_is_refused_by_a_code(
    body: bytes, place: Path, tmp_path: Path
) -> None:
    asked = Asked(place, tmp_path / "state")
    assert asked.ask("hello", body).head["error"] == "question"
    asked.hello()
    labels = body if body != b"[]" else b'["' + b"x" * 65 + b'"]'
    assert asked.ask("ready", labels).head["error"] == "question"
    assert not (tmp_path / "state" / RUN / "labels.json").exists()


@pytest.mark.parametrize(
    ("asked_for", "reply", "code"),
    [
        ("hello", SiteMessage({"error": "rows", "labels": CANARY}), "failed"),
        ("hello", SiteMessage({"error": "rows"}, CANARY.encode()), "failed"),
        ("hello", SiteMessage({"error": CANARY}), "failed"),
        (
            "hello",
            SiteMessage({"labels": json.dumps([f"{CANARY}{n}" for n in range(101)])}),
            "labels",
        ),
        ("hello", SiteMessage({"labels": json.dumps([CANARY * 9])}), "labels"),
    ],
)
def test_what_is_no_allowed_answer_leaves_as_a_code_whoever_made_it(
    asked_for: str, reply: SiteMessage, code: str, asked: Asked
) -> None:
    left = leave(asked.config, asked_for, RUN, reply)
    assert dict(left.head) == {"site": "ann", "protocol": PROTOCOL, "error": code}
    assert left.body == b""
