"""Claims about runs across sites: the same bits as on one machine, and little that travels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calls import calls, configuration, make_place, remote

from rolora import runs
from rolora.adapter import tensor_hash
from rolora.flower.carrier import pause
from rolora.flower.parcel import Parcel
from rolora.rounds import RoundResult
from rolora.runs import Run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("sites"))


def bits(run: Run, last: RoundResult) -> dict[str, str]:
    return {name: tensor_hash(t) for name, t in last.state.server.adapter.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method.name=fedit",),
        ("method.name=local",),
        ("wire.up=int8",),
        ("lora.dropout=0.3", "train.local_epochs=1"),
        ("data.client_test=0.3",),
    ],
    ids=" ".join,
)
def test_a_run_across_sites_ends_with_the_bits_of_one_on_one_machine(
    overrides: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    changed = [o for o in overrides if not o.startswith("train.local_epochs")]
    config = configuration(place, *changed)
    if len(changed) < len(overrides):
        train = config.train.model_copy(update={"local_steps": None, "local_epochs": 1})
        config = config.model_copy(update={"train": train})
    here = runs.start(config, tmp_path / "here")
    *_, mine = here.rounds()
    there = remote(config, tmp_path / "there", calls(place, tmp_path))
    *_, theirs = there.rounds()
    assert bits(there, theirs) == bits(here, mine)
    assert theirs.cohort == mine.cohort
    assert theirs.clients == mine.clients
    assert (theirs.bytes_up, theirs.bytes_down) == (mine.bytes_up, mine.bytes_down)
    assert theirs.rejected == {}


def test_only_what_a_site_lacks_is_sent_and_its_rows_never_are(place: Path, tmp_path: Path) -> None:
    carrier = calls(place, tmp_path)
    run = remote(configuration(place), tmp_path / "run", carrier)
    down = [result.bytes_down for result in run.rounds()][1:]
    asked = [q for _, q, _ in carrier.passed if q.head["ask"] == "train"]
    assert sum(len(q.body) for q in asked) <= sum(down) + 200 * len(asked)
    words = b"warm heart"
    assert not any(
        words in reply.body for _, _, reply in carrier.passed if isinstance(reply, Parcel)
    )
    lines = (tmp_path / "ann" / "outgoing.log").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    mine = [reply for name, _, reply in carrier.passed if name == "site-ann"]
    assert [entry["bytes"] for entry in told] == [
        len(r.body) for r in mine if isinstance(r, Parcel)
    ]
    trained = [entry for entry in told if entry["asked"] == "train"]
    assert all(entry["tensors"] and entry["left"]["round"] for entry in trained)


def test_a_site_that_lost_what_it_held_is_sent_everything(place: Path, tmp_path: Path) -> None:
    config = configuration(place, "train.participation=1.0")
    *_, whole = remote(config, tmp_path / "a", calls(place, tmp_path / "1")).rounds()
    carrier = calls(place, tmp_path / "2")
    run = remote(config, tmp_path / "b", carrier)
    for result in run.rounds():
        last = result
        if result.round == 2:
            for file in (tmp_path / "2" / "bob").rglob("*.safetensors"):
                file.unlink()
    lacked = [
        q.head["round"]
        for _, q, r in carrier.passed
        if isinstance(r, Parcel) and r.head.get("lacks")
    ]
    assert lacked == [3]
    assert bits(run, last) == {n: tensor_hash(t) for n, t in whole.state.server.adapter.items()}


def test_a_message_is_found_late_by_a_tenth_of_the_waiting_and_not_looked_for_all_the_time() -> (
    None
):
    waited, looks = 0.0, 0
    while waited < 60:
        late = pause(waited, longest=1.0)
        assert late <= min(max(0.2, waited / 10), 1.0)
        waited, looks = waited + late, looks + 1
    assert looks < 80
