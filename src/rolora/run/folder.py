"""The run folder: configuration, one JSON line per round, checkpoints; each written atomically.

A round is committed by its checkpoint (written whole, then renamed into place); its line in
``rounds.jsonl`` follows. A resume cuts the lines back to the checkpoint and, if the power went in
between, takes the missing line from the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.ledger import Held, Ledger
from rolora.algorithm.method import ServerState
from rolora.errors import ConfigError, RoloraError
from rolora.files import (
    DOOMED,
    append_line,
    finite,
    locked,
    new_folder,
    sweep,
    sweep_beside,
    write_file,
)
from rolora.run.place import require_new
from rolora.training.rounds import Best, RoundResult, RunState

KEPT_CHECKPOINTS = 2  # the newest; and the last that a later round was trained from


def line(result: RoundResult) -> dict[str, Any]:
    """A round's line in ``rounds.jsonl``; what its lists are over, ``axes.json`` has once.

    A score that is NaN or infinite is null.
    """
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    del values["advanced"], values["reason"]
    values["stale"] = values.pop("state").stale
    values["recall"] = [round(share, 4) for share in result.recall.values()]
    values["layers"] = {
        what: [None if value is None else float(f"{value:.4g}") for value in own.values()]
        for what, own in result.layers.items()
    }
    for key in ("missing", "cut", "recall", "layers", "stale"):
        if not values[key]:
            del values[key]  # most rules cut nobody, and most rounds are not evaluated
    values |= {"loss": result.loss, "moved": result.moved, "seconds": round(result.seconds, 3)}
    return dict(finite(values))


def as_json(value: object) -> str:
    """The text of a JSON file for people to read, too."""
    return json.dumps(value, indent=1) + "\n"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def rounds(self) -> Path:
        """One JSON line per round."""
        return self.path / "rounds.jsonl"

    @property
    def axes(self) -> Path:
        """What the lists in the lines of ``rounds`` are over; see ``Experiment.axes``."""
        return self.path / "axes.json"

    @property
    def clients(self) -> Path:
        """Personal adapters, where the method has any."""
        return self.path / "clients"

    @property
    def adapter(self) -> Path:
        """The PEFT adapter folder that a finished run leaves."""
        return self.path / "adapter"

    @property
    def samples(self) -> Path:
        """What a finished language model wrote for a few prompts; see ``rolora.run.samples``."""
        return self.path / "samples.json"

    @property
    def report(self) -> Path:
        """The report of a finished run, which is written last."""
        return self.path / "report.html"

    @property
    def diverged(self) -> Path:
        """One line on where training became NaN or infinite; missing if it did not."""
        return self.path / "diverged.txt"

    @property
    def tracked_as(self) -> Path:
        """The run's name in trackers, drawn when it is first tracked, so that a resumed run goes on
        there."""
        return self.path / "tracked_as.txt"

    @property
    def ended(self) -> bool:
        """Whether the run is finished, or has diverged."""
        return self.report.is_file() or self.diverged.is_file()

    @classmethod
    def create(
        cls, path: Path, config: str, partition: Mapping[str, Any], axes: Mapping[str, Any]
    ) -> RunFolder:
        """A new run folder; for ``axes`` see ``Experiment.axes``.

        ConfigError if ``path`` exists: nothing is overwritten.
        """
        require_new(path)
        with new_folder(path) as part:
            (part / "config.toml").write_text(config)
            (part / "partition.json").write_text(as_json(partition))
            (part / "axes.json").write_text(as_json(axes))
            (part / "rounds.jsonl").touch()
            (part / "checkpoints").mkdir()
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder. ConfigError if ``path`` is not one."""
        for name in ("config.toml", "rounds.jsonl", "partition.json"):
            if not (path / name).is_file():
                raise ConfigError(f"{path} is not a run folder: {name} is missing")
        return cls(path)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for this process. ConfigError if another process is writing to it."""
        return locked(self.path / ".lock")

    def commit(self, result: RoundResult) -> None:
        """Save the state after a round (or a failed attempt at one), then its line."""
        state, values = result.state, line(result)
        payload = save(contents(state))
        manifest = {
            "round": state.server.round,
            "attempt": state.server.attempt,
            "scaling": state.server.adapter.scaling,
            "ledger": {"changed": state.ledger.changed, "held": state.ledger.held},
            "stale": state.stale,
            "phases": state.phases,
            "best": state.best and {"round": state.best.round, "value": state.best.value},
            "line": values if result.advanced else None,
            "reason": result.reason,
        }
        manifest["sha256"] = _digest(manifest, payload)
        retry = f"-attempt-{state.server.attempt:03d}" if state.server.attempt else ""
        name = f"round-{state.server.round:06d}{retry}"
        with new_folder(self.path / "checkpoints" / name, replace=True) as part:
            (part / "state.safetensors").write_bytes(payload)
            (part / "manifest.json").write_text(json.dumps(manifest))
        if result.advanced:
            append_line(self.rounds, json.dumps(values))
        for old in _unneeded([folder.name for folder in self._checkpoints()]):
            _remove(self.path / "checkpoints" / old)

    def restore(self, start: RunState) -> tuple[RunState, list[str]]:
        """The newest intact state, and notes on damaged ones.

        ``start`` if nothing was committed yet. Cuts ``rounds.jsonl`` back to the state. Raises
        RoloraError if there are checkpoints but none can be read. For who holds the lock.
        """
        sweep(self.path)
        sweep_beside(self.path)
        if not self._checkpoints():
            write_file(self.rounds, "")
            return start, []
        notes: list[str] = []
        for folder in reversed(self._checkpoints()):
            try:
                state, last = _read_checkpoint(folder)
            except (OSError, ValueError, RecursionError) as error:
                notes.append(f"checkpoint {folder.name} is damaged ({error}); using the one before")
                _remove(folder)
                continue
            return state, [*notes, *self._cut_lines(state, last)]
        raise RoloraError(
            f"no checkpoint of {self.path} can be read, so it cannot be resumed; start again "
            f"with: rolora run {self.config} --out NEW_FOLDER"
        )

    @property
    def newest(self) -> str:
        """The name of the newest checkpoint; "" before there is one."""
        return "".join(folder.name for folder in self._checkpoints()[-1:])

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*"))

    def _cut_lines(self, state: RunState, last: Mapping[str, Any] | None) -> list[str]:
        """Cut ``rounds.jsonl`` back to this state; a note if lines of finished rounds are lost."""
        if state.server.round == 0 and state.server.attempt == 0:
            write_file(self.rounds, "")  # round 0 is evaluated, and written, again
            return []
        kept, round = [], state.server.round
        for text in self.rounds.read_text(errors="replace").splitlines():
            try:
                if json.loads(text)["round"] <= round:
                    kept.append(text)
            except (ValueError, TypeError, KeyError, RecursionError):
                break  # a line cut off by a crash
        if last is not None and (not kept or json.loads(kept[-1])["round"] < round):
            kept.append(json.dumps(last))
        write_file(self.rounds, "".join(text + "\n" for text in kept))
        lost = round + 1 - len(kept)
        return [f"{self.rounds} has lost the lines of {lost} finished rounds"] if lost > 0 else []


def _unneeded(names: Sequence[str]) -> list[str]:
    """The checkpoints, in order, that neither a resume needs nor anybody who goes back to the last
    state that is known to be good: a round was trained from it."""
    older, newest = names[:-KEPT_CHECKPOINTS], names[-1]
    proven = [name for name in names if _round_of(name) < _round_of(newest)]
    return [name for name in older if name not in proven[-1:]]


def _round_of(name: str) -> str:
    return name.partition("-attempt-")[0]


def contents(state: RunState) -> dict[str, Tensor]:
    """The tensors that a checkpoint of this state holds."""
    memory = {n: t for n, t in state.server.memory.items() if isinstance(t, Tensor)}
    parts: dict[str, Mapping[str, Tensor]] = {
        "adapter": state.server.adapter,
        "memory": memory,
        "patches": state.server.patches,
    }
    if state.best is not None:
        parts["best"] = state.best.adapter
    return {
        f"{part}/{name}": tensor.contiguous().clone()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _digest(manifest: Mapping[str, Any], payload: bytes) -> str:
    """A hash of all that a checkpoint holds; ``manifest`` is without it."""
    return hashlib.sha256(json.dumps(manifest).encode() + payload).hexdigest()


def _read_checkpoint(folder: Path) -> tuple[RunState, dict[str, Any] | None]:
    """OSError, ValueError or RecursionError unless both files are as they were written."""
    manifest = json.loads((folder / "manifest.json").read_text())
    payload = (folder / "state.safetensors").read_bytes()
    if not isinstance(manifest, dict) or manifest.pop("sha256", "") != _digest(manifest, payload):
        raise ValueError("its sha256 does not match")
    kinds = ("adapter", "memory", "patches", "best")
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for name, tensor in load(payload).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    scaling = manifest["scaling"]
    server = ServerState(
        adapter=AdapterState(parts["adapter"], scaling),
        memory=parts["memory"],
        round=manifest["round"],
        attempt=manifest["attempt"],
        patches=parts["patches"],
    )
    best = manifest["best"]
    if best is not None:
        best = Best(best["round"], best["value"], AdapterState(parts["best"], scaling))
    held = {client: Held(*held) for client, held in manifest["ledger"]["held"].items()}
    ledger = Ledger(manifest["ledger"]["changed"], held)
    state = RunState(server, ledger, best, manifest["stale"], manifest["phases"])
    return state, manifest["line"]


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a crash in between leaves no partial one under its name."""
    doomed = folder.with_name(f"{DOOMED}{folder.name}")
    folder.rename(doomed)
    for file in doomed.iterdir():
        file.unlink()
    doomed.rmdir()
