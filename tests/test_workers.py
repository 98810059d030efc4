"""Claims about worker processes: the same bytes as without them, whatever befalls one of them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from test_memory import FULL, starving
from tiny import tiny_bert
from tiny_site import make_site, write_rows

import rolora
from rolora.errors import ConfigError, RoloraError
from rolora.model import base, prefix
from rolora.run import shards
from rolora.run.experiment import Experiment
from rolora.run.workers import cards
from rolora.training.local import NonFiniteLoss
from rolora.training.memory import PROCESS
from rolora.training.processes import AHEAD, ATTEMPTS, Processes, deal

pytestmark = pytest.mark.usefixtures("quick")
T = TypeVar("T")


class Pickling(ThreadPoolExecutor):
    """Calls and results travel as to another process; two threads of this one work."""

    def __init__(self) -> None:
        super().__init__(2)
        self.calls = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        self.calls += 1
        return super().submit(called, pickle.dumps(partial(fn, *args, **kwargs)))


def called(text: bytes) -> Any:
    return pickle.loads(pickle.dumps(pickle.loads(text)()))


@pytest.fixture(scope="module")
def executor() -> Iterator[Pickling]:
    with Pickling() as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny site with enough test rows for several batches."""
    config = make_site(tmp_path_factory.mktemp("site"))
    write_rows(config.parent / "test.csv", 200)
    return config


def left_by(folder: Path) -> Mapping[str, Any]:
    """All that a run leaves, but for times, and for how many workers it had."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(folder))] = path.read_bytes()
    lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    found["lines"] = [{**line, "seconds": 0} for line in lines]
    return found


def ran(place: Path, out: Path, *overrides: str, executor: Executor | None = None) -> Path:
    """The folder of a whole run of the place, in groups of two clients."""
    config = rolora.load_config(place, ["train.participation=1.0", "train.bank=2", *overrides])
    list(rolora.start(config, out, executor=executor).rounds())
    return out


KINDS = {
    "rolora": [],
    "a part of the clients": ["train.participation=0.6"],
    "int8 uploads": ["wire.up=int8"],
    "kept moments": ["train.keep_moments=true", "method.name=fedit"],
    "personal factors": ["method.name=fedsa_lora", "data.client_test=0.3"],
    "personal adapters, validated": [
        "method.name=local",
        "data.client_test=0.3",
        "data.validation=0.2",
    ],
    "several ranks": ["method.name=hetlora", "lora.rank=[1, 2]"],
    "all rows in one place": ["method.name=centralized"],
    "a first gradient": ["method.name=fed_sb"],
    "deltas": ["method.name=fedex_lora"],
    "forged updates": ["attack.name=sign_flip"],
    "another answer asked for": ["attack.name=backdoor", "attack.trigger=and", "attack.target=bad"],
    "a cached prefix": ["lora.layers=top:1", "train.cache=CACHE", "train.local_steps=4"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_same_bytes_however_many_workers_train(
    place: Path, tmp_path: Path, executor: Pickling, kind: str
) -> None:
    changes = [text.replace("CACHE", str(tmp_path / "cache")) for text in KINDS[kind]]
    alone = left_by(ran(place, tmp_path / "alone", *changes))
    for count in (2, 3):
        before = executor.calls
        several = ran(
            place, tmp_path / str(count), *changes, f"train.workers={count}", executor=executor
        )
        assert executor.calls > before + 4
        assert left_by(several) == alone


def test_a_cached_prefix_is_computed_once_for_all_workers(
    place: Path, tmp_path: Path, executor: Pickling, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []
    whole = prefix._fill

    def counted(*given: Any) -> None:
        computed.append(given)
        whole(*given)

    monkeypatch.setattr(prefix, "_fill", counted)
    changes = ["lora.layers=top:1", f"train.cache={tmp_path / 'cache'}", "train.local_steps=4"]
    ran(place, tmp_path / "run", *changes, "train.workers=2", executor=executor)
    assert len(computed) == 2  # of the rows to train on and of those to test on


def test_workers_read_no_rows_and_no_text(
    place: Path, tmp_path: Path, executor: Pickling, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = shards.load_rows

    def counted(*given: Any, **more: Any) -> Any:
        read.append(threading.get_ident())
        return whole(*given, **more)

    monkeypatch.setattr("rolora.run.experiment.load_rows", counted)
    ran(place, tmp_path / "run", "train.workers=2", "seed=5", executor=executor)
    assert read == [threading.get_ident()]
    assert not list((tmp_path / "run").glob(".*rows*"))  # those that were written for them


def test_a_run_in_the_place_of_another_trains_on_its_own_rows(
    tmp_path: Path, executor: Pickling
) -> None:
    place, changes = make_site(tmp_path / "site"), ("train.rounds=1", "train.workers=2")
    ran(place, tmp_path / "run", *changes, executor=executor)
    shutil.rmtree(tmp_path / "run")
    rows = place.parent / "train.csv"
    rows.write_text(rows.read_text().replace("warm heart", "thin plot"))
    alone = ran(place, tmp_path / "alone", "train.rounds=1")
    again = ran(place, tmp_path / "run", *changes, executor=executor)
    assert left_by(again) == left_by(alone)


def test_groups_that_do_not_fit_in_memory_are_halved_as_in_one_process(
    place: Path,
    tmp_path: Path,
    executor: Pickling,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = ("train.bank=3", "train.rounds=2")
    monkeypatch.setattr("rolora.training.engine.train_group", starving(2, [], FULL))
    monkeypatch.setattr("rolora.run.workers.train_group", starving(2, [], FULL))
    alone = ran(place, tmp_path / "alone", *changes)
    with caplog.at_level(logging.WARNING):
        several = ran(place, tmp_path / "several", *changes, "train.workers=2", executor=executor)
    assert left_by(several) == left_by(alone)
    said = "3 clients at once do not fit in memory: continuing with 1"
    assert [one.message for one in caplog.records] == [said, said]
    monkeypatch.setattr("rolora.run.workers.train_group", starving(0, [], FULL))
    with pytest.raises(RoloraError, match="one client's step does not fit in memory"):
        ran(place, tmp_path / "starved", *changes, "train.workers=2", executor=executor)


def test_a_run_that_diverges_in_a_worker_is_recorded_as_one_that_diverged(
    place: Path, tmp_path: Path, executor: Pickling
) -> None:
    with pytest.raises(NonFiniteLoss, match="loss of client 'client-000'"):
        ran(place, tmp_path / "run", "train.lr=1e30", "train.workers=2", executor=executor)
    assert (tmp_path / "run" / "diverged.txt").is_file()


def test_a_worker_that_finds_another_model_ends_the_run_in_one_line(
    tmp_path: Path, executor: Pickling
) -> None:
    place = make_site(tmp_path / "site")
    config = rolora.load_config(place, ["train.workers=2", "train.bank=1", "lora.rank=3"])
    run = rolora.start(config, tmp_path / "run", executor=executor)
    tiny_bert(place.parent / "model", seed=1)
    expected = r"^a worker process on .*: the base model model is not the one that the run has"
    with pytest.raises(RoloraError, match=expected):
        list(run.rounds())


def test_a_resumed_run_may_have_another_number_of_workers(
    place: Path, tmp_path: Path, executor: Pickling
) -> None:
    alone = ran(place, tmp_path / "alone")
    config = rolora.load_config(place, ["train.participation=1.0", "train.bank=2"])
    with contextlib.closing(rolora.start(config, tmp_path / "run").rounds()) as rounds:
        next(rounds)
        next(rounds)
    before = executor.calls
    changed = ["train.workers=2"]
    list(rolora.resume(tmp_path / "run", overrides=changed, executor=executor).rounds())
    assert executor.calls > before
    assert left_by(tmp_path / "run") == left_by(alone)


def test_a_comparison_loads_the_base_once_in_its_workers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes work for all of its runs."""
    pools: list[Pickling] = []

    def all_processes(config: object) -> Pickling:
        pools.append(Pickling())
        return pools[-1]

    monkeypatch.setattr("rolora.comparison.queue.all_processes", all_processes)
    loaded: list[int] = []
    whole = base.load_base

    def counted(*given: Any, **more: Any) -> Any:
        loaded.append(threading.get_ident())
        return whole(*given, **more)

    monkeypatch.setattr("rolora.run.experiment.load_base", counted)
    bytes_of = []
    for changes in ([], ["train.workers=2"]):
        config = rolora.load_config(
            place, ["train.participation=1.0", "train.bank=2", "lora.rank=5", *changes]
        )
        out = tmp_path / f"compared{len(changes)}"
        for run in rolora.compare(config, ["rolora", "fedit"], [0, 1], out):
            list(run.rounds())
        bytes_of.append([left_by(one) for one in sorted(out.glob("*-seed*"))])
    assert len(bytes_of[0]) == 4
    assert bytes_of[0] == bytes_of[1]
    assert loaded.count(threading.get_ident()) == 2  # for each comparison
    assert len(loaded) == 3
    assert pools[0].calls == 0 < pools[1].calls


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.engine=debug"], "train.engine = 'debug' trains one client at a time"),
        (["federation.on=there"], "train.workers is for runs on one machine"),
    ],
)
def test_workers_are_refused_where_there_can_be_none(
    place: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        rolora.load_config(place, ["train.workers=2", *overrides])


def test_the_debug_engine_works_here_whatever_executor_there_is(
    place: Path, tmp_path: Path, executor: Pickling
) -> None:
    before = executor.calls
    ran(place, tmp_path / "run", "train.engine=debug", "train.rounds=1", executor=executor)
    assert executor.calls == before


def test_there_are_never_more_workers_than_groups_cores_and_memory_allow(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(*overrides: str) -> int:
        config = rolora.load_config(place, ["train.participation=1.0", *overrides])
        return Experiment(config, tmp_path / "clients").workers

    monkeypatch.setattr("rolora.run.experiment.usable_cores", lambda: 3)
    assert count("train.workers=auto", "train.bank=1") == 3
    assert count("train.workers=auto", "train.bank=3") == 2
    assert count("train.workers=9", "train.bank=1") == 5
    assert count("train.workers=9", "train.bank=1", "method.name=centralized") == 1
    assert count("train.workers=auto", "train.bank=1", "train.engine=debug") == 1
    assert count("train.bank=1") == 1
    monkeypatch.setattr("rolora.run.experiment.free_bytes", lambda device: 5 * PROCESS)
    assert count("train.workers=auto", "train.bank=1") == 2


def test_a_worker_has_one_card_or_with_a_device_map_all_of_them(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    wanted = ["device=cuda", "train.workers=auto", "train.participation=1.0"]
    for changes, names, count in ([], ["0", "1"], 2), (["model.device_map=auto"], [], 1):
        config = rolora.load_config(place, [*wanted, *changes])
        assert cards(config) == names
        assert Experiment(config, tmp_path / "clients", bank=1).workers == count


# the executor


def test_results_come_in_order_and_no_more_calls_are_under_way_than_allowed() -> None:
    under_way: list[int] = []
    most = taken = 0
    gate = threading.Event()

    def call(number: int) -> int:
        nonlocal most
        under_way.append(number)
        most = max(most, len(under_way))
        if number == 0:
            gate.wait(60)
        time.sleep(0.01)
        under_way.remove(number)
        return number

    def calls() -> Iterator[Callable[[], int]]:
        nonlocal taken
        for number in range(40):
            taken += 1
            if number == 5:
                gate.set()
            yield partial(call, number)

    with ThreadPoolExecutor(8) as threads:
        results = deal(threads, calls(), 2)
        assert next(results) == 0
        assert taken <= AHEAD * 2 + 1  # a result that is not used holds the others up
        assert list(results) == list(range(1, 40))
    assert most == 2


def test_a_call_whose_process_dies_is_made_again_and_given_up_after_some_deaths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Processes(2) as processes, caplog.at_level(logging.WARNING):
        doomed, other = processes.submit(os._exit, 9), processes.submit(os.getpid)
        with pytest.raises(RoloraError, match=f"^{ATTEMPTS} worker processes have died"):
            doomed.result()
        assert psutil.pid_exists(other.result())
        assert processes.submit(os.getpid).result() != os.getpid()
    assert len(caplog.records) == ATTEMPTS


def test_processes_end_at_once_in_the_middle_of_a_call() -> None:
    processes = Processes(2)
    pid = processes.submit(os.getpid).result()
    under_way = processes.submit(time.sleep, 600)
    while not under_way.running():
        time.sleep(0.01)
    processes.shutdown()
    assert not psutil.pid_exists(pid)
    assert under_way.exception() is not None or under_way.cancelled()


# the program


class Program:
    """``rolora`` in a process of its own; ``said`` are the lines of standard error so far."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-m", "rolora", *map(str, words)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.said: list[str] = []

    def until(self, text: str) -> None:
        """Read until a line holds this text."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} was never said: {self.said}")

    def end(self) -> int:
        """The exit code."""
        assert self.process.stderr is not None
        with self.process.stderr:
            self.said += list(self.process.stderr)
        return self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """The processes that train, without those that are dead already."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # also of a zombie
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
        return found


LONG = ["train.rounds=24", "train.participation=1.0", "train.bank=2", "eval.every=12"]


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    program = Program("run", place, *LONG, "--out", out)
    assert program.end() == 0, program.said
    return out


def test_the_program_leaves_the_same_bytes_with_three_workers(
    place: Path, tmp_path: Path, undisturbed: Path
) -> None:
    program = Program("run", place, *LONG, "train.workers=3", "--out", tmp_path / "run")
    assert program.end() == 0, program.said
    assert left_by(tmp_path / "run") == left_by(undisturbed)


# a kill in every round: some minutes, since each new process imports torch
OFTEN = pytest.param(range(2, 22), marks=pytest.mark.slow, id="20-times")


@pytest.mark.parametrize("kills", [pytest.param((2, 4), id="twice"), OFTEN])
def test_a_run_whose_workers_are_killed_ends_with_the_same_bytes(
    place: Path, tmp_path: Path, undisturbed: Path, kills: Sequence[int]
) -> None:
    program = Program("run", place, *LONG, "train.workers=2", "--out", tmp_path / "run")
    for turn, round in enumerate(kills):
        program.until(f"round {round}")
        program.workers()[-(turn % 2)].kill()
    assert program.end() == 0, program.said
    died = [line for line in program.said if "a worker process has died" in line]
    assert len(died) == len(kills), program.said
    assert not any("Traceback" in line for line in program.said)
    assert left_by(tmp_path / "run") == left_by(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_run_that_is_stopped_and_it_resumes_to_the_same_bytes(
    place: Path, tmp_path: Path, undisturbed: Path, executor: Pickling, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    program = Program("run", place, *LONG, "train.workers=2", "--out", out)
    program.until("round 2")
    workers = program.workers()
    assert len(workers) == 2
    if number == signal.SIGKILL:
        program.process.kill()
    else:
        os.killpg(program.process.pid, number)  # as a terminal does
    assert program.end() == (-9 if number == signal.SIGKILL else 130)
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left
    if number != signal.SIGKILL:
        assert f"continue with: rolora resume {out}" in program.said[-1]
        assert not any("Traceback" in line or "died" in line for line in program.said)
    list(rolora.resume(out, executor=executor).rounds())
    assert left_by(out) == left_by(undisturbed)


def test_a_script_without_a_guard_is_not_run_again_by_its_workers(
    place: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import rolora\n"
        "print('begun')\n"
        f"config = rolora.load_config({str(place)!r}, "
        "['train.workers=2', 'train.bank=1', 'train.rounds=1'])\n"
        f"print(len(list(rolora.start(config, {str(tmp_path / 'run')!r}).rounds())))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.split() == ["begun", "2"], done.stderr


def test_a_cluster_of_dask_trains_to_the_same_bytes(
    place: Path, tmp_path: Path, undisturbed: Path
) -> None:
    distributed = pytest.importorskip("distributed", reason="pip install 'rolora[cluster]'")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        config = rolora.load_config(place, [*LONG, "train.workers=2"])
        run = rolora.start(config, tmp_path / "run", executor=client.get_executor())
        list(run.rounds())
    assert left_by(tmp_path / "run") == left_by(undisturbed)
