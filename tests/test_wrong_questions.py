"""What a site does with questions that are wrong: a code, and the next right one is answered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from calls import calls, configuration, make_place, remote, wired

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.codec import encode
from rolora.flower.message import Scalar, SiteMessage, compress_names, digest
from rolora.sites.site import Site

pytestmark = pytest.mark.usefixtures("quick")
SITE = "site-ann"


@dataclass(frozen=True)
class Heard:
    """A place with rows, and the first question of each kind to one site there, with its answer."""

    place: Path
    questions: dict[str, SiteMessage]
    answers: dict[str, SiteMessage]


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    folder = tmp_path_factory.mktemp("heard")
    place = make_place(folder)
    transport = calls(place, folder / "state")
    overrides = ("train.rounds=1", "train.participation=1.0", "data.client_test=0.3")
    for _ in remote(configuration(place, *overrides), folder / "run", transport).rounds():
        continue
    found = Heard(place, {}, {})
    for name, question, answer in transport.passed:
        if name == SITE:
            found.questions.setdefault(question.text("ask"), question)
            found.answers.setdefault(question.text("ask"), answer)
    assert set(found.questions) == {"hello", "ready", "train", "score"}
    return found


def new_site(heard: Heard, state: Path) -> Site:
    """The same site without anything of the run."""
    (site,) = (s for s in calls(heard.place, state).sites.values() if s.config.name == SITE)
    return site


def changed(question: SiteMessage, body: bytes | None = None, **head: Scalar) -> SiteMessage:
    body = question.body if body is None else body
    return wired(replace(question, head={**question.head, **head}, body=body))


NOTHING = AdapterState({}, {})
EMPTY: dict[str, Scalar] = {"names": compress_names([], ["any"]), "view": digest({})}


@pytest.mark.parametrize(
    ("ask", "head", "body", "answered"),
    [
        ("train", {"round": 0}, None, {"error": "question"}),
        ("train", {"num_examples": 1}, None, {"error": "count"}),
        ("train", {"lr": 3e38}, None, {"error": "diverged"}),
        ("train", {}, b"rubbish", {"error": "question"}),
        ("train", {"more": "x" * 10_000_000}, None, {"error": "question"}),
        ("train", {"view": "0" * 32}, None, {"lacks": True}),
        ("score", {"view": "0" * 32}, None, {"lacks": True}),
        ("train", EMPTY, encode("fp32", NOTHING, NOTHING, {})[0], {"lacks": True}),
    ],
    ids=["round", "rows", "rate", "bytes", "size", "adapter", "adapter to score", "no tensors"],
)
def test_a_wrong_question_is_answered_by_a_code_and_the_right_one_after_it_as_ever(
    ask: str,
    head: dict[str, Scalar],
    body: bytes | None,
    answered: dict[str, Scalar],
    heard: Heard,
    tmp_path: Path,
) -> None:
    site, asked = new_site(heard, tmp_path / "state"), heard.questions
    for kind in ("hello", "ready"):
        assert site.answer(asked[kind]).head == heard.answers[kind].head
    found = site.answer(changed(asked[ask], body, **head))
    assert {key: found.head.get(key) for key in answered} == answered
    assert found.body == b""
    right = site.answer(asked[ask])
    assert (right.head, right.body) == (heard.answers[ask].head, heard.answers[ask].body)


def test_a_site_that_does_not_know_the_labels_yet_trains_nothing(
    heard: Heard, tmp_path: Path
) -> None:
    site = new_site(heard, tmp_path / "state")
    site.answer(heard.questions["hello"])
    assert site.answer(heard.questions["train"]).head["error"] == "question"
