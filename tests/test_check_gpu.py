"""The check for machines with a GPU runs, with tiny shapes on a CPU, and notices what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check_gpu


def rehearse(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--rehearse", "--out", str(out)])
    code = check_gpu.main()
    return code, json.loads(out.read_text())["parts"]


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_a_rehearsal_makes_every_claim_and_each_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, parts = rehearse(monkeypatch, tmp_path / "gpu.json")
    assert code == 0
    assert list(parts) == ["small", "cards", "encoder", "decoder"]
    claims = [one for found in parts.values() for one in found if "bound" in one]
    assert len(claims) == 18
    assert all(one["found"] <= one["bound"] for one in claims)
    assert [one["tokens"] for one in parts["encoder"] if "tokens" in one] == [32, 128]


def test_a_claim_that_fails_and_a_part_that_ends_in_an_error_are_recorded_as_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(machine: check_gpu.Machine) -> Iterator[check_gpu.Claim]:
        yield check_gpu.Claim("too far", 2.0, 1.0)

    def broken(machine: check_gpu.Machine) -> Iterator[check_gpu.Claim]:
        yield check_gpu.Claim("near", 0.5, 1.0)
        raise RuntimeError("out of memory")

    for part, expected in ((wrong, "found"), (broken, "error")):
        monkeypatch.setattr(check_gpu, "PARTS", {"part": part})
        code, parts = rehearse(monkeypatch, tmp_path / "gpu.json")
        assert code == 1
        assert expected in parts["part"][-1]
