"""Runs across real processes: TLS, node keys, and what happens when one is killed."""

from __future__ import annotations

import os
import signal
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from loopback import (
    NAMES,
    Command,
    Loopback,
    adapter,
    federation,
    here,
    make_place,
    processes,
    rounds,
    until,
)
from lying_site import LIES, TOO_LARGE
from safetensors.torch import load_file
from tiny import tiny_bert

from rolora.sites import keys
from rolora.sites.folder import FederationFolder
from rolora.sites.submit import job_folder

ALL = "aggregate.quorum=3"
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def served(config: Path) -> Iterator[Loopback]:
    with federation(config.parent / "fed", config) as opened:
        yield opened


@pytest.fixture
def fed(served: Loopback) -> Loopback:
    """All sites are there."""
    served.join(*NAMES)
    return served


@pytest.fixture(scope="module")
def undisturbed(config: Path, served: Loopback) -> str:
    """The adapter's hash of six rounds of all sites, in one process."""
    return here(served.folder / "run.toml", served.place / "here")


def attempts(out: Path) -> list[tuple[int, int]]:
    return [(line["round"], line["attempt"]) for line in rounds(out)]


@pytest.mark.flower
def test_a_federation_of_processes_ends_with_the_adapter_of_one_process(
    tmp_path: Path,
) -> None:
    config = make_place(tmp_path)
    overrides = ("train.participation=0.6", "train.local_steps=4")
    with federation(tmp_path / "fed", config, *overrides) as fed:
        fed.join(*NAMES)
        run = fed.run("there")
        assert run.ended() == 0, run.output()
        alone = here(fed.folder / "run.toml", tmp_path / "here")
        here(fed.folder / "run.toml", tmp_path / "banked", "train.bank=3")
    assert adapter(tmp_path / "there") == alone
    assert [r["cohort"] for r in rounds(tmp_path / "there")] == [
        r["cohort"] for r in rounds(tmp_path / "here")
    ]
    assert {len(r["cohort"]) for r in rounds(tmp_path / "there")[1:]} == {2}
    left, right = (load_file(tmp_path / o / "adapter" / FILE) for o in ("there", "banked"))
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.flower
def test_a_flood_without_a_key_neither_fills_the_superlink_nor_disturbs_the_run(
    tmp_path: Path,
) -> None:
    config = make_place(tmp_path)
    (tmp_path / "cy.csv").unlink()
    with federation(tmp_path / "fed", config) as fed:
        fed.join("ann", "bob")
        (link,) = processes(f"rolora.sites.superlink\0{fed.folder}")
        run = fed.run("there")
        fed.reached("there", 1)
        with peak_memory(link) as peak:
            answers = flood(fed, requests=1000, size=10_000_000)
            assert run.process.poll() is None, "it was still under way"
            assert run.ended() == 0, run.output()
        alone = here(fed.folder / "run.toml", tmp_path / "here")
    print(f"peak {max(peak) / 1e6:.0f} MB, {Counter(answers)}")
    assert set(answers) <= {401, 0}, "0 where the line was cut before the answer was read"
    assert answers.count(401) > 500
    assert max(peak) < 400e6
    assert adapter(tmp_path / "there") == alone
    assert attempts(tmp_path / "there") == attempts(tmp_path / "here")


@contextmanager
def peak_memory(process: int) -> Iterator[list[int]]:
    """Bytes in memory of a process, sampled while the block lasts."""
    samples, done = list[int](), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            samples.append(psutil.Process(process).memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def flood(fed: Loopback, requests: int, size: int) -> list[int]:
    """Post bodies of ``size`` bytes, 32 at a time; each answer's status, 0 if the line was cut."""
    opened, body = FederationFolder.open(fed.folder), bytes(size)
    url = f"https://127.0.0.1:{opened.port}/v1/fleet/push-object"
    context = ssl.create_default_context(cafile=fed.folder / "ca.crt")
    kinds: tuple[dict[str, str], ...] = ({}, stranger(), {"x-forwarded-for": "127.0.0.1"})

    def post(number: int) -> int:
        content = iter([body]) if number % 2 else body
        headers = {"content-type": "application/protobuf", **kinds[number % len(kinds)]}
        try:
            answer = httpx.post(url, content=content, headers=headers, verify=context, timeout=120)
            return answer.status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(post, range(requests)))


def stranger() -> dict[str, str]:
    """Headers that are signed well, by a key that nobody registered."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = httpx.Request("POST", "https://x")
    context = ProtobufRequestContext("", PushObjectRequest(), request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda _: httpx.Response(200))
    return {name: value for name, value in request.headers.items() if name.startswith("flwr")}


@pytest.mark.flower
def test_control_is_on_its_own_port_with_the_secret_and_no_command_line_shows_it(
    fed: Loopback,
) -> None:
    opened = FederationFolder.open(fed.folder)
    secret = (fed.folder / "control.secret").read_text()
    context = ssl.create_default_context(cafile=fed.folder / "ca.crt")

    def status(port: int, **headers: str) -> int:
        url = f"https://127.0.0.1:{port}/v1/control/list-nodes"
        sent = {"content-type": "application/protobuf", **headers}
        return httpx.post(url, headers=sent, verify=context).status_code

    assert status(opened.port, authorization=f"Bearer {secret}") == 403
    assert status(opened.control) == 401
    assert status(opened.control, authorization=f"Bearer {secret}") == 200
    run = fed.run("secrets", "train.rounds=3")
    fed.reached("secrets", 1)
    assert fed.served is not None
    programs = psutil.Process(fed.served.process.pid).children(recursive=True)
    lines = [" ".join(one.cmdline()) for one in programs]
    assert run.ended() == 0, run.output()
    assert len(lines) == 3, "SuperLink, SuperExec and the run's app"
    (app,) = (line for line in lines if "flwr-serverapp" in line)
    assert "--token-file /dev/fd/" in app
    assert "--token " not in app
    assert not any(secret in line for line in lines)


@pytest.mark.flower
def test_a_site_killed_in_a_round_takes_the_question_up_again(
    fed: Loopback, undisturbed: str
) -> None:
    run = fed.run("site-killed", ALL)
    fed.reached("site-killed", 2)
    until(lambda: fed.answering("bob"), what="bob to train")
    fed.leave("bob", number=signal.SIGKILL)
    assert fed.answering("bob")
    fed.join("bob")
    assert run.ended() == 0, run.output()
    out = fed.place / "site-killed"
    assert adapter(out) == undisturbed
    assert attempts(out) == [(round, 0) for round in range(7)]


@pytest.mark.flower
def test_a_round_goes_on_without_a_site_that_stays_away(fed: Loopback) -> None:
    run = fed.run("site-gone", "aggregate.quorum=2")
    fed.reached("site-gone", 2)
    until(lambda: fed.answering("bob"), what="bob to train")
    fed.leave("bob", number=signal.SIGKILL)
    assert run.ended() == 0, run.output()
    lines = rounds(fed.place / "site-gone")
    lost = [line for line in lines if "bob" in line.get("missing", {})]
    assert len(lost) == 1, "one round waits for it, the next knows that it is gone"
    assert sorted(lost[0]["clients"]) == ["ann", "cy"]
    assert lines[-1]["round"] == 6
    assert lines[-1]["cohort"] == ["ann", "cy"]


@pytest.mark.flower
def test_a_straggler_past_the_deadline_is_left_behind_and_may_come_back(fed: Loopback) -> None:
    run = fed.run("straggler", "aggregate.quorum=2", "federation.deadline=12")
    fed.reached("straggler", 1)
    until(lambda: fed.answering("cy"), what="cy to train")
    os.kill(fed.sites["cy"].process.pid, signal.SIGSTOP)
    fed.reached("straggler", 2)
    os.kill(fed.sites["cy"].process.pid, signal.SIGCONT)
    assert run.ended() == 0, run.output()
    lines = {line["round"]: line for line in rounds(fed.place / "straggler")}
    assert "no answer before the deadline" in lines[2]["missing"]["cy"]
    assert "cy" in lines[6]["clients"]


@pytest.mark.flower
def test_without_any_site_the_run_ends_with_4_and_can_be_resumed(
    fed: Loopback, undisturbed: str
) -> None:
    run = fed.run("alone", ALL, "federation.deadline=10", "federation.wait=10")
    fed.reached("alone", 2)
    fed.leave(*NAMES, number=signal.SIGKILL)
    started = time.monotonic()
    assert run.ended() == 4, run.output()
    assert time.monotonic() - started < 90
    assert "resume" in run.output().splitlines()[-1]
    fed.join(*NAMES)
    again = fed.run("alone", resume=True)
    assert again.ended() == 0, again.output()
    assert adapter(fed.place / "alone") == undisturbed


@pytest.mark.flower
def test_a_coordinator_that_is_killed_loses_no_finished_round(
    fed: Loopback, undisturbed: str
) -> None:
    run = fed.run("coordinator-killed", ALL)
    fed.reached("coordinator-killed", 3)
    until(lambda: fed.answering("ann"), what="ann to train")
    os.kill(fed.coordinator("coordinator-killed"), signal.SIGKILL)
    assert run.ended() == 1
    assert "continue with: rolora resume" in run.output().splitlines()[-1]
    out = fed.place / "coordinator-killed"
    kept = rounds(out)
    assert kept[-1]["round"] >= 3
    again = fed.run("coordinator-killed", resume=True)
    assert again.ended() == 0, again.output()
    assert rounds(out)[: len(kept)] == kept
    assert adapter(out) == undisturbed


@pytest.mark.flower
def test_a_superlink_that_is_killed_ends_the_federation_and_the_run_goes_on_with_the_next(
    fed: Loopback, undisturbed: str
) -> None:
    run = fed.run("superlink-killed", ALL)
    fed.reached("superlink-killed", 2)
    until(lambda: fed.answering("ann"), what="ann to train")
    fed.kill_superlink()
    kept = rounds(fed.place / "superlink-killed")
    run = fed.serve_again(run, "superlink-killed", 4)
    assert run.ended() == 0, run.output()
    assert rounds(fed.place / "superlink-killed")[: len(kept)] == kept
    assert adapter(fed.place / "superlink-killed") == undisturbed
    assert attempts(fed.place / "superlink-killed") == [(round, 0) for round in range(7)]


@pytest.mark.flower
def test_a_federation_that_is_interrupted_ends_the_run_which_can_be_resumed(
    fed: Loopback, undisturbed: str
) -> None:
    run = fed.run("stopped", ALL)
    fed.reached("stopped", 2)
    assert fed.served is not None
    fed.served.end(signal.SIGTERM)
    assert run.ended(60) == 1, run.output()
    assert not job_folder(fed.place / "stopped").exists()
    fed.serve()
    again = fed.run("stopped", resume=True)
    assert again.ended() == 0, again.output()
    assert adapter(fed.place / "stopped") == undisturbed


@pytest.mark.flower
def test_the_command_that_follows_a_run_can_be_interrupted_and_the_run_resumed(
    fed: Loopback, undisturbed: str
) -> None:
    run = fed.run("interrupted", ALL)
    fed.reached("interrupted", 2)
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == 130, run.output()
    assert not job_folder(fed.place / "interrupted").exists()
    again = fed.run("interrupted", resume=True)
    assert again.ended() == 0, again.output()
    assert adapter(fed.place / "interrupted") == undisturbed


@pytest.mark.flower
def test_sites_may_join_late_and_leave_for_two_rounds(fed: Loopback) -> None:
    fed.leave("cy")
    run = fed.run("late", "federation.sites=2", "train.rounds=500")
    out = fed.place / "late"

    def took_part(after: int) -> int | None:
        """The first round after this one in which cy was used."""
        found = (line["round"] for line in rounds(out) if "cy" in line["clients"])
        return next((round for round in found if round > after), None)

    fed.reached("late", 2)
    fed.join("cy")
    until(lambda: took_part(0), what="a round with cy")
    assert (took_part(0) or 0) > 2
    fed.leave("cy")
    left = rounds(out)[-1]["round"]
    fed.reached("late", left + 3)
    away = [line for line in rounds(out) if line["round"] > left and "cy" not in line["clients"]]
    assert len(away) >= 2
    fed.join("cy")
    back = rounds(out)[-1]["round"]
    until(lambda: took_part(back), what="a round with cy again, given what it lacked")
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == 130, run.output()
    assert all(line["attempt"] == 0 for line in rounds(out))


@pytest.mark.flower
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ('key = "other.key"', "the SuperLink does not know this site's key"),
        ("", "the SuperLink asks for a key"),
        ('key = "none.key"', "none.key"),
    ],
)
def test_a_site_with_a_wrong_key_or_none_is_refused_in_one_line(
    key: str, said: str, fed: Loopback, tmp_path: Path
) -> None:
    keys.make_site(tmp_path, "other")
    own = fed.folder / "sites" / "ann"
    text = (own / "site.toml").read_text().replace('key = "ann.key"', key)
    text = text.replace('"ca.crt"', f'"{own / "ca.crt"}"').replace('"ann.', f'"{own}/ann.')
    (tmp_path / "site.toml").write_text(text)
    site = Command.start(tmp_path / "log", "site", "--config", tmp_path / "site.toml")
    assert site.ended(60) in (1, 2)
    assert said in site.output()
    assert len(site.output().splitlines()) == 1
    doctor = Command.start(tmp_path / "doctor", "doctor", tmp_path / "site.toml")
    assert doctor.ended(60) == 1
    assert said in doctor.output()


@pytest.mark.flower
def test_a_site_with_another_base_model_is_refused_by_its_hash_and_named(
    fed: Loopback, tmp_path: Path
) -> None:
    fed.leave("cy")
    file = fed.folder / "sites" / "cy" / "site.toml"
    own = file.read_text()
    tiny_bert(tmp_path / "other", seed=1)
    file.write_text(f'{own}model = "{tmp_path / "other"}"\n')
    try:
        fed.join("cy")
        run = fed.run("other-base", "train.rounds=2")
        assert run.ended() == 0, run.output()
    finally:
        file.write_text(own)
        fed.leave("cy")
    assert "site cy is refused: it has another base model" in run.output()
    assert rounds(fed.place / "other-base")[-1]["cohort"] == ["ann", "bob"]


@pytest.mark.flower
def test_a_key_joins_by_the_name_that_it_was_registered_for_and_no_other(fed: Loopback) -> None:
    fed.leave("cy")
    file = fed.folder / "sites" / "cy" / "site.toml"
    own = file.read_text()
    file.write_text(own.replace('name = "cy"', 'name = "ann"'))
    try:
        fed.join("cy")
        run = fed.run("other-name", "train.rounds=2", "federation.sites=2")
        assert run.ended() == 0, run.output()
    finally:
        file.write_text(own)
        fed.leave("cy")
    assert "it calls itself 'ann', but its key is that of 'cy'" in run.output()
    assert rounds(fed.place / "other-name")[-1]["cohort"] == ["ann", "bob"]


@pytest.mark.flower
def test_lies_are_rejected_and_counted_one_by_one_and_the_run_goes_on(fed: Loopback) -> None:
    fed.leave("cy")
    fed.join("cy", program=(str(Path(__file__).with_name("lying_site.py")),))
    rounds_of_lies = f"train.rounds={len(LIES) + 2}"
    run = fed.run("lies", rounds_of_lies, "aggregate.quorum=2")
    assert run.ended(900) == 0, run.output()
    said_at_site = fed.sites["cy"].output()
    fed.leave("cy")
    unused = {r["round"]: r["rejected"] | r.get("missing", {}) for r in rounds(fed.place / "lies")}
    found = {round: by_site.get("cy", "") for round, by_site in unused.items()}
    for round, (lie, (said, _)) in enumerate(LIES.items(), 1):
        assert said in found[round], lie
    assert TOO_LARGE[0] in found[len(LIES) + 1]
    assert "an answer was dropped: the SuperLink answered: 413" in said_at_site
    assert found[len(LIES) + 2] == "", "an honest answer after all the lies is used"
