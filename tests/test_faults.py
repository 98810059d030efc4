"""A round is committed whole or not at all: faults at every file operation, and the same bytes.

make test-faults
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import site_trials
import trials
from injection import FAULTS, in_child
from records import Record
from rich.progress import track

MANY = tuple(FAULTS)
COLUMNS = ["what was under way", "trained with", *MANY, "killed twice", "not as promised"]

ABOUT = """A tiny model of two layers, four clients, four rounds. In each trial one file operation \
of a process goes wrong: open for writing, a write, fsync, rename, unlink, mkdir or rmdir. Killed: \
SIGKILL before the operation (and after the last). Killed in the middle: half of a write is done. \
Power cut: a kill, after which content and names that were not flushed are lost. Disk full: this \
and all later writes fail. Killed twice: the resume is killed too, at a drawn operation. Faults \
that leave the disk as another one does are tried once. Then the run is resumed to its end, or \
the site started again, and all that is left is compared."""


@pytest.fixture(scope="module")
def record(pytestconfig: pytest.Config) -> Iterator[Record]:
    """Rows of docs/reliability.md."""
    wanted = pytestconfig.getoption("record")
    kept = Record("faults", "Faults", ABOUT, "make test-faults", COLUMNS, trials.SEED, wanted, 2)
    yield kept
    kept.write()


def figures(what: str, kind: str, done: list[trials.Trial], wrong: int) -> list[str]:
    """A row: how many trials with each fault."""
    twice = sum(trial.again is not None for trial in done)
    once = [trial.fault for trial in done if trial.again is None]
    return [what, kind, *(str(once.count(fault)) for fault in MANY), str(twice), str(wrong)]


@pytest.mark.parametrize(
    ("kind", "part"),
    [(kind, part) for kind, parts in trials.PARTS_OF.items() for part in parts],
)
def test_a_fault_at_any_file_operation_of_a_run_leaves_one_that_resumes_to_the_same_bytes(
    kind: str, part: str, tmp_path: Path, record: Record
) -> None:
    place = trials.Place(tmp_path, kind)
    place.prepare()
    expected = trials.left_by(place.undisturbed)
    assert expected["adapter"]
    assert [line["round"] for line in expected["lines"]] == list(range(trials.ROUNDS + 1))
    assert bool(expected["clients"]) == (kind != "rolora")
    planned = list(trials.trials(place, part, MANY, twice=kind == "rolora"))
    wrong = []
    for trial in track(planned, f"{kind}: {part}", auto_refresh=False):
        if found := trials.outcome(place, trial, expected):
            wrong.append(f"{trial}: {found}")
    record.add(figures(part, kind, planned, len(wrong)))
    assert not wrong, f"{len(wrong)} trials, of which the first are:\n" + "\n".join(wrong[:9])


@pytest.mark.parametrize("kind", site_trials.KINDS)
def test_a_site_that_a_fault_befalls_gives_the_same_answer_in_its_next_process(
    kind: str, tmp_path: Path, record: Record
) -> None:
    place = site_trials.SitePlace(tmp_path, kind)
    place.prepare()
    wrong = []
    part = site_trials.PART_OF[kind]
    planned = list(site_trials.trials(place, part, MANY))
    for trial in track(planned, f"{kind}: {part}", auto_refresh=False):
        if found := site_trials.outcome(place, trial):
            wrong.append(f"{trial}: {found}")
    record.add(figures(part, kind, planned, len(wrong)))
    assert not wrong, f"{len(wrong)} trials, of which the first are:\n" + "\n".join(wrong[:9])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> trials.Place:
    made = trials.Place(tmp_path_factory.mktemp("place"), "rolora, int8 uploads")
    made.prepare()
    return made


def test_every_file_that_a_run_leaves_was_seen_by_the_injection(place: trials.Place) -> None:
    """Otherwise a library that writes past Python would be spared."""
    seen = {
        re.sub(r"^\.part-|-\d+$|\d", "", Path(path).name)
        for part in trials.PARTS
        for kind, path, _ in place.operations(part)
        if kind in ("open", "write")
    }
    files = {path.name for path in place.undisturbed.rglob("*") if path.is_file()}
    assert not {re.sub(r"\d", "", name) for name in files} - seen


def test_the_injection_notices_lines_that_are_cut_in_place(
    place: trials.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trials.left_by(place.undisturbed)

    def in_place(path: Path, content: str) -> None:
        path.write_text(content)

    monkeypatch.setattr("rolora.run.folder.write_file", in_place)
    planned = trials.trials(place, "a round that trains B", ("killed in the middle",))
    assert trials.outcome(place, next(planned), expected) == (
        "other lines than those of the undisturbed run"
    )


# a limit that the system sets


@pytest.mark.parametrize("kilobytes", [1, 4, 16, 64])
@pytest.mark.parametrize("part", list(trials.PARTS)[1:])
def test_a_file_larger_than_the_system_allows_ends_the_run_in_one_line(
    place: trials.Place, part: str, kilobytes: int
) -> None:
    """RLIMIT_FSIZE: the system's own refusal, for every library that writes."""
    trial = place.trial(part)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, resource.RLIM_INFINITY))
        trials.command("resume", trial / "run")

    said = trial / "said.txt"
    code = in_child(limited, said)
    resource_said = said.read_text()
    if code != 0:
        assert code == 1, resource_said
        assert "Traceback" not in resource_said
        assert resource_said.splitlines()[-1].startswith("rolora: File too large")
    assert place.go_on(trial) == 0, place.said()
    assert trials.left_by(trial / "run") == trials.left_by(place.undisturbed)


NAMESPACES = 0x10000000 | 0x00020000  # CLONE_NEWUSER and CLONE_NEWNS, of linux/sched.h


def mount(folder: Path, kilobytes: int) -> None:
    """For a forked process: a tmpfs at this place, which only it sees. OSError if not allowed."""
    system, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if system.unshare(NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    size = f"size={kilobytes}k".encode()
    if system.mount(b"none", bytes(folder), b"tmpfs", 0, size):
        raise OSError(ctypes.get_errno(), "mount")


def test_a_disk_that_is_really_full_ends_the_run_in_one_line(
    place: trials.Place, tmp_path: Path
) -> None:
    """The run goes on in a small tmpfs at its place; what is there at its end is resumed."""
    (tmp_path / "mounted").mkdir()
    tried = in_child(lambda: mount(tmp_path / "mounted", 64), tmp_path / "said.txt")
    if tried != 0:
        pytest.skip(f"no tmpfs can be mounted: {(tmp_path / 'said.txt').read_text()[-200:]}")
    codes = [goes_on_in(kilobytes, place) for kilobytes in (80, 96, 128, 160, 1024)]
    assert codes[0] == 1
    assert codes[-1] == 0


def goes_on_in(kilobytes: int, place: trials.Place) -> int:
    """The exit code of a run on so small a disk."""
    trial = place.trial("a round that trains B")
    run, before, after = (trial / name for name in ("run", "before", "after"))
    shutil.copytree(run, before)

    def filled() -> None:
        mount(run, kilobytes)
        shutil.copytree(before, run, dirs_exist_ok=True)
        try:
            trials.command("resume", run)
        finally:
            shutil.copytree(run, after)

    code = in_child(filled, trial / "said.txt")
    said = (trial / "said.txt").read_text()
    assert "Traceback" not in said, said
    if code != 0:
        assert code == 1, said
        assert said.splitlines()[-1].startswith("rolora: No space left on device")
    shutil.rmtree(run)
    after.rename(run)
    assert place.go_on(trial) == 0, place.said()
    assert trials.left_by(run) == trials.left_by(place.undisturbed)
    return code


# clocks


def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the wall clock is days ahead or behind, differently each time."""
    rng, real = random.Random(trials.SEED), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-30, 30) * 86400)


@pytest.mark.parametrize("kind", trials.KINDS)
def test_a_clock_that_jumps_by_days_changes_no_byte_and_no_lock(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = trials.Place(tmp_path, kind)
    place.prepare()
    jumping(monkeypatch)
    for part in trials.PARTS_OF[kind]:
        at = len(place.operations(part)) // 2
        trial = trials.Trial(part, "killed", at, "")
        assert trials.outcome(place, trial, trials.left_by(place.undisturbed)) == ""


def test_what_a_killed_process_left_is_swept_even_if_its_clock_was_ahead(
    place: trials.Place,
) -> None:
    trial = place.trial("a round that trains B")
    left = trial / "run" / ".part-config.toml-1"
    left.write_text("half")
    ahead = time.time() + 86400
    os.utime(left, (ahead, ahead))
    assert place.go_on(trial) == 0, place.said()
    assert trials.left_over(trial / "run") == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> site_trials.SitePlace:
    made = site_trials.SitePlace(tmp_path_factory.mktemp("site"), "rolora, int8 uploads")
    made.prepare()
    return made


@pytest.mark.parametrize("days", [-40, 40])
def test_a_question_that_a_jump_of_the_clock_has_expired_is_answered_when_it_is_asked_again(
    days: int, site: site_trials.SitePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = site_trials.PART_OF[site.kind]
    round, real = site_trials.PARTS[part], time.time
    at = len(site.operations(part)) // 2
    link = site.trial(part)
    assert site.serve(link, at, "killed") == -9
    monkeypatch.setattr(time, "time", lambda: real() + days * 86400)
    assert site.serve(link) == 0, site.said()
    assert bool(link.answer(str(round))) == (days < 0)
    link.send(str(round), site.question(round))
    assert site.serve(link) == 0, site.said()
    assert link.answer(str(round)) == site.expected(round)


def test_a_site_whose_unanswered_question_is_damaged_goes_on(
    site: site_trials.SitePlace,
) -> None:
    part = site_trials.PART_OF[site.kind]
    link = site.trial(part)
    (link.folder / "state" / "question.bin").write_bytes(b"\xff half")
    assert site.serve(link) == 0, site.said()
    assert link.answer(str(site_trials.PARTS[part])) == site.expected(site_trials.PARTS[part])
    assert not (link.folder / "state" / "question.bin").exists()
