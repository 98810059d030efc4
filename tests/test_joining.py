"""Sites that come while a run goes on: they are asked beside the rounds, which never wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from calls import Calls, T, calls, configuration, make_place, remote
from flwr.supercore.task_identity import TaskIdentity

from rolora.algorithm.adapter import tensor_hash
from rolora.flower.membership import Membership
from rolora.flower.message import SiteMessage, lost
from rolora.flower.transport import GridTransport, to_record
from rolora.model.base import Base
from rolora.run.experiment import Experiment
from rolora.run.runs import Run
from rolora.sites.site import Site
from rolora.training.rounds import RoundResult

pytestmark = pytest.mark.usefixtures("quick")

SETTINGS = ("train.participation=1.0", "train.rounds=6", "federation.sites=2")
BOTH = ("site-ann", "site-bob")
ALL = (*BOTH, "site-cy")
LABELS = ("bad", "cat", "good")
LATE = 12  # the node of site-cy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("sites"))


@dataclass
class Held(Calls):
    """What is beside the rounds is kept, and done when the test says so."""

    kept: list[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=list)

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self.kept.append((future, work))
        return future

    def go(self) -> None:
        """All of it is done."""
        for future, work in self.kept:
            future.set_result(work())
        self.kept.clear()


def without_cy(transport: Calls) -> Site:
    return transport.sites.pop(LATE)


def started(place: Path, folder: Path, transport: Calls, *more: str) -> Run:
    return remote(configuration(place, *SETTINGS, *more), folder / "run", transport)


def joined_late(place: Path, folder: Path, transport: Calls) -> tuple[Run, Iterator[RoundResult]]:
    """A run, and its rounds after the evaluation at its start, after which site-cy appears."""
    late = without_cy(transport)
    run = started(place, folder, transport)
    rounds = run.rounds()
    next(rounds)
    transport.sites[LATE] = late
    return run, rounds


def asked(transport: Calls) -> list[str]:
    """What site-cy was asked, in order."""
    return [str(question.head["ask"]) for name, question, _ in transport.passed if name == ALL[2]]


def test_a_site_that_answers_while_a_round_runs_is_a_member_in_the_next(
    place: Path, tmp_path: Path
) -> None:
    transport = calls(place, tmp_path)
    late = without_cy(transport)
    rounds = started(place, tmp_path, transport).rounds()
    next(rounds), next(rounds)
    transport.sites[LATE] = late
    assert next(rounds).cohort == BOTH
    assert asked(transport) == ["hello", "ready"]
    assert next(rounds).cohort == ALL


def test_a_silent_site_that_appears_is_asked_once_and_no_round_waits_for_it(
    place: Path, tmp_path: Path
) -> None:
    transport = Held(calls(place, tmp_path).sites)
    _, rounds = joined_late(place, tmp_path, transport)
    assert [result.cohort for result in rounds] == [BOTH] * 6
    assert len(transport.kept) == 1
    assert asked(transport) == []


@dataclass
class Loading(Calls):
    """What is beside the rounds runs in a thread, and a model is only ``loaded`` in the end."""

    loaded: threading.Event = field(default_factory=threading.Event)
    pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        return self.pool.submit(work)

    def ask(
        self, questions: Mapping[int, SiteMessage], seconds: float
    ) -> Iterator[tuple[int, SiteMessage]]:
        if LATE in questions and questions[LATE].head["ask"] == "ready":
            assert self.loaded.wait(100)
        yield from super().ask(questions, seconds)


def test_a_site_that_takes_long_to_load_its_model_holds_up_no_round(
    place: Path, tmp_path: Path
) -> None:
    transport = Loading(calls(place, tmp_path).sites)
    run, rounds = joined_late(place, tmp_path, transport)
    assert [next(rounds).cohort for _ in range(3)] == [BOTH] * 3
    (talk,) = pending(run)
    assert not talk.done()
    transport.loaded.set()
    wait([talk], 100)
    assert next(rounds).cohort == ALL
    transport.pool.shutdown()


def pending(run: Run) -> list[Future[Any]]:
    """What is asked in the background."""
    membership: Membership = cast("Any", run.experiment.engine).membership
    return [one.answers for one in membership.asked.values()]


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("\x1b[2J no route"), KeyError(), AssertionError()], ids=repr
)
def test_whatever_asking_a_new_site_raises_the_run_ends_as_without_it(
    error: Exception, place: Path, tmp_path: Path
) -> None:
    class Broken(Calls):
        def ask(
            self, questions: Mapping[int, SiteMessage], seconds: float
        ) -> Iterator[tuple[int, SiteMessage]]:
            if LATE in questions:
                raise error
            return super().ask(questions, seconds)

    adapters = []
    for number, kind in enumerate((Calls, Broken)):
        transport = kind(calls(place, tmp_path / f"{number}").sites)
        late = without_cy(transport)
        rounds = started(place, tmp_path / f"{number}", transport).rounds()
        next(rounds)
        if kind is Broken:
            transport.sites[LATE] = late
        *_, last = rounds
        assert last.cohort == BOTH
        adapters.append({n: tensor_hash(t) for n, t in last.state.server.adapter.items()})
    assert adapters[0] == adapters[1]
    said = [line for line in transport.notified if "joined" not in line]
    name = type(error).__name__
    assert said == [f"site node {LATE} could not be asked to join ({name})"] * 2  # then a pause


@pytest.fixture(scope="module")
def base(place: Path) -> Base:
    return Experiment(configuration(place)).base


def membership(
    place: Path, transport: Calls, registered: Callable[[], Mapping[int, str] | None] = lambda: None
) -> Membership:
    config = configuration(place, "train.participation=1.0")
    return Membership(
        transport, Experiment(config), "0123456789abcdef", transport.notified.append, registered
    )


def test_a_site_that_got_ready_for_other_labels_is_asked_again(
    place: Path, tmp_path: Path, base: Base
) -> None:
    transport = Held(calls(place, tmp_path).sites)
    sites = membership(place, transport)
    sites.present(base, (*LABELS, "dog"))
    transport.go()
    assert sites.present(base, LABELS) == {}
    assert sites.refused == {}
    transport.go()
    assert tuple(sites.present(base, LABELS)) == ALL


def test_a_site_whose_key_is_removed_while_it_is_asked_does_not_join(
    place: Path, tmp_path: Path, base: Base
) -> None:
    transport, keys = Held(calls(place, tmp_path).sites), {10: BOTH[0], 11: BOTH[1], LATE: ALL[2]}
    sites = membership(place, transport, lambda: keys)
    sites.present(base, LABELS)
    transport.go()
    del keys[LATE]
    assert tuple(sites.present(base, LABELS)) == BOTH
    assert transport.kept == []


def test_of_two_new_nodes_of_one_name_one_joins_and_the_other_is_refused(
    place: Path, tmp_path: Path, base: Base
) -> None:
    transport = Held(calls(place, tmp_path).sites)
    copy = transport.sites[LATE].config.model_copy(update={"state": str(tmp_path / "copy")})
    transport.sites[13] = Site(copy)
    sites = membership(place, transport)
    sites.present(base, LABELS)
    transport.go()
    assert {name: member.node for name, member in sites.present(base, LABELS).items()} == {
        **dict(zip(ALL, (10, 11, LATE), strict=True))
    }
    assert list(sites.refused) == [13]


def test_a_site_that_cannot_be_used_is_not_told_the_labels_of_the_others(
    place: Path, tmp_path: Path, base: Base
) -> None:
    transport = calls(place, tmp_path)
    sites = membership(place, transport)
    sites.present(base, LABELS[:2])
    assert [question.head["ask"] for _, question, _ in transport.passed] == ["hello"] * 3
    assert sites.present(base, LABELS[:2]) == {}
    assert all("label 'good' is not in this run" in why for why in sites.refused.values())


class Grid:
    """A grid that answers each question with its node's number, once ``met`` has let it."""

    def __init__(self, met: Callable[[], object], answers: bool = True) -> None:
        self.met, self.answers, self.pushed = met, answers, list[int]()

    def push_messages(self, messages: Any) -> list[str]:
        nodes = [message.metadata.dst_node_id for message in messages]
        self.pushed += nodes
        self.met()
        return [f"to {node}" for node in nodes]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        if not self.answers:
            return []
        (id,) = ids
        content = to_record(SiteMessage({"n": int(id[3:])}))
        about = SimpleNamespace(reply_to_message_id=id)
        return [SimpleNamespace(metadata=about, content=content, has_error=lambda: False)]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("task")
def test_questions_of_two_threads_at_once_get_their_own_answers() -> None:
    both_ask = threading.Barrier(2)
    transport = GridTransport(cast("Any", Grid(lambda: both_ask.wait(30))))

    def ask(node: int) -> list[tuple[int, SiteMessage]]:
        return list(transport.ask({node: SiteMessage({"ask": "hello"})}, 30))

    beside = transport.in_background(lambda: ask(1))
    assert ask(2) == [(2, SiteMessage({"n": 2}))]
    assert beside.result(30) == [(1, SiteMessage({"n": 1}))]
    transport.close()


@pytest.mark.usefixtures("task")
def test_no_question_outlives_the_run() -> None:
    pushed = threading.Event()
    grid = Grid(pushed.set, answers=False)
    transport = GridTransport(cast("Any", grid))
    question = {1: SiteMessage({"ask": "hello"})}
    beside = transport.in_background(lambda: list(transport.ask(question, 10_000)))
    assert pushed.wait(30)
    transport.close()
    silent = [(1, lost("no answer before the deadline"))]
    assert beside.result(30) == silent
    assert list(transport.ask(question, 10_000)) == silent
    assert grid.pushed == [1]
