"""The run folder: committed rounds survive a crash at any moment, and damage is noticed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.ledger import Held, Ledger
from rolora.algorithm.method import ServerState
from rolora.errors import ConfigError, RoloraError
from rolora.files import (
    append_line,
    being_written,
    is_locked,
    locked,
    new_folder,
    sweep,
    write_file,
)
from rolora.results.runs import gain, load_run
from rolora.run.folder import RunFolder, line
from rolora.run.tracking import scalars
from rolora.training.rounds import Best, RoundResult, RunState


def state(round: int, attempt: int = 0) -> RunState:
    tensors = {
        "x.lora_A.weight": torch.full((2, 3), round + 0.1),
        "x.lora_B.weight": torch.ones(4, 2),
    }
    adapter = AdapterState(tensors, {"x": 2.0})
    best = Best(1, 0.5, adapter) if round else None
    server = ServerState(adapter, {"velocity": torch.ones(3)}, round, attempt)
    return RunState(
        server, Ledger({"x.lora_A.weight": round}, {"c": Held(round, True)}), best, stale=round
    )


def result(round: int, attempt: int = 0, advanced: bool = True) -> RoundResult:
    return RoundResult(
        round=round,
        attempt=attempt,
        factors=("B",),
        cohort=("c",),
        lr=0.1,
        clients={"c": {"num_examples": 2, "loss": 0.5, "steps": 1}},
        metrics={},
        validation={},
        client_metrics={},
        aggregation_error=0.0,
        bytes_up=1,
        bytes_down=2,
        seconds=0.1,
        rejected={},
        advanced=advanced,
        state=state(round, attempt),
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run", "name = 'x'\n", {"clients": []}, {})
    for round in range(4):
        run.commit(result(round))
    return run


def rounds(folder: RunFolder) -> list[int]:
    return [json.loads(text)["round"] for text in folder.rounds.read_text().splitlines()]


def assert_same(one: RunState, other: RunState) -> None:
    for a, b in [
        (one.server.adapter, other.server.adapter),
        (one.server.memory, other.server.memory),
        (one.best.adapter if one.best else {}, other.best.adapter if other.best else {}),
    ]:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert one.server.adapter.scaling == other.server.adapter.scaling
    assert (one.ledger, one.stale, one.server.round) == (
        other.ledger,
        other.stale,
        other.server.round,
    )
    assert one.server.attempt == other.server.attempt


def test_a_score_that_is_not_finite_is_null_on_disk_and_is_read_as_the_worst(
    tmp_path: Path,
) -> None:
    config = "name = 'x'\nseed = 0\n[method]\nname = 'fedit'\n"
    clients = {"clients": [{"id": "c", "num_examples": 2, "labels": {}}]}
    run = RunFolder.create(tmp_path / "run", config, clients, {})
    scored = replace(
        result(0), metrics={"perplexity": math.inf}, client_metrics={"c": {"perplexity": math.nan}}
    )
    run.commit(scored)
    text = run.rounds.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    read = load_run(run.path)
    assert [gain("perplexity", point.value) for point in read.curve("perplexity")] == [-math.inf]
    assert read.rounds[0]["client_metrics"] == {"c": {"perplexity": math.inf}}
    assert "eval/perplexity" not in scalars(line(scored))
    assert scalars(line(scored)) == scalars(read.rounds[0])


def test_a_restored_state_is_the_committed_one_to_the_bit(folder: RunFolder) -> None:
    restored, notes = folder.restore(state(0))
    assert notes == []
    assert_same(restored, state(3))


def test_only_the_newest_two_checkpoints_are_kept(folder: RunFolder) -> None:
    names = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert names == ["round-000002", "round-000003"]


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "another", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    folder: RunFolder, file: str, damage: str
) -> None:
    path = folder.path / "checkpoints" / "round-000003" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "another":
        path.write_text("[]")
    else:
        content[len(content) // 2] ^= 0x20 if damage == "flipped" else 0
        path.write_bytes(content[:-5] if damage == "truncated" else content)
    restored, notes = folder.restore(state(0))
    assert restored.server.round == 2
    assert "round-000003 is damaged" in notes[0]
    assert rounds(folder) == [0, 1, 2]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"round": 3', '"round": 2'), ('"x": 2.0', '"x": 3.0'), ('"stale": 3', '"stale": "3"')],
)
def test_one_changed_value_of_a_manifest_is_noticed(folder: RunFolder, old: str, new: str) -> None:
    path = folder.path / "checkpoints" / "round-000003" / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    restored, notes = folder.restore(state(0))
    assert restored.server.round == 2
    assert "round-000003 is damaged" in notes[0]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"round": ' * 5000, "3", '"sha256"', "null"])
def test_whatever_stands_in_a_manifest_or_a_line_the_checkpoint_before_is_found(
    folder: RunFolder, text: str
) -> None:
    (folder.path / "checkpoints" / "round-000003" / "manifest.json").write_text(text)
    with folder.rounds.open("a") as file:
        file.write(text + "\n")
    restored, _ = folder.restore(state(0))
    assert restored.server.round == 2
    assert rounds(folder) == [0, 1, 2]


def test_when_no_checkpoint_can_be_read_the_run_is_not_silently_restarted(
    folder: RunFolder,
) -> None:
    for path in (folder.path / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RoloraError, match=r"no checkpoint of .* can be read"):
        folder.restore(state(0))


def test_a_line_lost_between_checkpoint_and_log_comes_back_from_the_checkpoint(
    folder: RunFolder,
) -> None:
    text = folder.rounds.read_text().splitlines(keepends=True)
    folder.rounds.write_text("".join(text[:-1]) + text[-1][:20])
    folder.restore(state(0))
    assert rounds(folder) == [0, 1, 2, 3]
    assert folder.rounds.read_text().splitlines()[-1] == json.dumps(line(result(3)))


def test_lines_of_rounds_after_the_checkpoint_are_cut(folder: RunFolder) -> None:
    with folder.rounds.open("a") as file:
        file.write(json.dumps({"round": 4}) + "\n")
    folder.restore(state(0))
    assert rounds(folder) == [0, 1, 2, 3]


def test_lost_lines_of_finished_rounds_are_told(folder: RunFolder) -> None:
    text = folder.rounds.read_text().splitlines(keepends=True)
    folder.rounds.write_text("".join(text[2:]))
    _, notes = folder.restore(state(0))
    assert ["lost the lines of 2 finished rounds" in note for note in notes] == [True]


def test_an_attempt_without_quorum_is_saved_but_is_no_round(folder: RunFolder) -> None:
    folder.commit(result(3, attempt=1, advanced=False))
    restored, _ = folder.restore(state(0))
    assert restored.server.attempt == 1
    assert rounds(folder) == [0, 1, 2, 3]


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_start(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "new", "", {}, {})
    begin = state(0)
    assert folder.restore(begin)[0] is begin


def test_a_run_folder_is_never_overwritten(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="not overwritten"):
        RunFolder.create(folder.path, "", {}, {})


def test_two_processes_cannot_write_to_one_run(folder: RunFolder) -> None:
    with (
        folder.locked(),
        pytest.raises(ConfigError, match="in use by another process"),
        folder.locked(),
    ):
        pass


def test_a_folder_that_fails_while_being_filled_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "x") as part:
            (part / "file").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_whole_keeps_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rolora.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as part:
        (part / "file").write_text("old")
    real = Path.rename

    def fails(source: Path, target: Path) -> Path:
        if target == path and not source.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), new_folder(path, replace=True) as part:
        (part / "file").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (path / "file").read_text() == "old"


def test_of_two_runs_that_start_in_the_same_new_folder_the_first_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path) -> None:
        """Finds nothing there; then another process makes its folder."""
        monkeypatch.undo()
        RunFolder.create(path, "first", {}, {})

    monkeypatch.setattr("rolora.run.folder.require_new", late)
    with pytest.raises(ConfigError, match="another process has just made it"):
        RunFolder.create(tmp_path / "run", "second", {}, {})
    assert (tmp_path / "run" / "config.toml").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_line_that_cannot_be_written_whole_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rolora.files.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            append_line(path, "two")
    append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


def test_a_line_that_was_cut_off_does_not_spoil_the_one_after_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntw")
    append_line(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"


def test_who_only_looks_at_a_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.touch()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with locked(path):
            assert is_locked(path)
    assert not is_locked(path)


def test_a_sweep_goes_by_no_clock_where_the_folder_is_locked(tmp_path: Path) -> None:
    left = tmp_path / ".part-file-1"
    left.touch()
    ahead = time.time() + 86400
    os.utime(left, (ahead, ahead))
    sweep(tmp_path)
    assert not left.exists()


def test_a_clock_that_jumps_ahead_has_no_file_swept_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = time.time() + 10 * 86400
    monkeypatch.setattr("rolora.files.time.time", lambda: ahead)
    part = tmp_path / ".part-file-1"
    with part.open("wb") as file:
        being_written(file)
        sweep(tmp_path, seconds=86400)
        assert part.exists()
    sweep(tmp_path, seconds=86400)
    assert not part.exists()


def test_of_more_than_ten_attempts_the_newest_is_restored(folder: RunFolder) -> None:
    for attempt in range(1, 13):
        folder.commit(result(3, attempt, advanced=False))
    restored, _ = folder.restore(state(0))
    assert restored.server.attempt == 12


def test_a_file_in_the_place_of_a_run_s_folder_is_named_and_stays(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("notes")
    with pytest.raises(ConfigError, match="run is a file: name a new folder with --out"):
        RunFolder.create(tmp_path / "run", "", {}, {})
    assert (tmp_path / "run").read_text() == "notes"


@pytest.mark.parametrize("missing", ["config.toml", "rounds.jsonl", "partition.json"])
def test_a_folder_that_is_no_run_s_is_refused_by_what_it_lacks(
    folder: RunFolder, missing: str
) -> None:
    (folder.path / missing).unlink()
    with pytest.raises(ConfigError, match=f"is not a run folder: {missing} is missing"):
        RunFolder.open(folder.path)
