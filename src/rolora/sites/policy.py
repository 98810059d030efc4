"""What a site's operator has agreed to in site.toml, applied to what the coordinator asks for.

A run reads columns by the role that the operator gave them, for a task that the operator allows,
and never so few rows that a number would reveal single ones. What has been answered is counted in
``uses.json`` in the state folder, so that a restart forgets nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError

from rolora.config.schema import AttackConfig, DataConfig, RunConfig
from rolora.errors import RoloraError
from rolora.files import make_folder, write_file
from rolora.flower.message import LABEL_LENGTH, REASONS
from rolora.run.settings import local_settings
from rolora.run.shards import hold_out
from rolora.sites.site_config import ROLES, SiteConfig
from rolora.tasks.registry import NO_COLUMNS, task_kind


class Refused(RoloraError):
    """What the operator has not agreed to. Only ``code``, of ``REASONS``, leaves the site."""

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in REASONS
        super().__init__(detail or REASONS[code])
        self.code = code


def consented(site: SiteConfig, config: RunConfig) -> RunConfig:
    """The run's configuration with this site's columns in the roles that it reads, and no attack.

    Raises Refused for a task, or a role, that the operator has not named.
    """
    task = config.model.task
    if task not in site.tasks:
        allowed = ", ".join(site.tasks)
        raise Refused(
            "task",
            f"the run's task is {task!r}, and site.toml allows {allowed}: to allow it, write "
            f"tasks = {json.dumps([*site.tasks, task])}",
        )
    own: dict[str, Any] = {}
    for key in task_kind(task).chosen(dict(config.data)):
        if key in NO_COLUMNS:
            continue
        column = getattr(site, key) if key in ROLES else None
        if column is None:
            raise Refused(
                "role",
                f"the run reads data.{key}, and no column has that role here: to allow it, write "
                f'{key} = "COLUMN" in site.toml',
            )
        own[key] = column
    data = DataConfig.model_validate({**config.data.model_dump(), **own})
    return config.model_copy(update={"data": data, "attack": AttackConfig()})


def require_bounded(site: SiteConfig, config: RunConfig, trained: int) -> None:
    """Raises Refused if a round would take more time or memory than the operator allows.

    ``trained`` is the number of rows to train on.
    """
    settings, rank = local_settings(config.train), config.lora.rank
    ranks = [rank] if isinstance(rank, int) else rank.values() if isinstance(rank, dict) else rank
    for key, asked in (
        ("max_steps", settings.num_steps(trained)),
        ("max_batch", min(settings.batch_size, trained)),
        ("max_rank", max(ranks)),
    ):
        if asked > (most := getattr(site, key)):
            raise Refused("limit", f"the run asks for {asked}, and {key} is {most}")


def require_rows(site: SiteConfig, config: RunConfig, trained: int, scored: int) -> None:
    """Raises Refused if a round would train on, or score, fewer rows than the operator allows.

    ``trained`` and ``scored`` are the rows to train on and those held out. A round of few small
    steps sees fewer rows than there are.
    """
    settings = local_settings(config.train)
    seen = min(trained, settings.num_steps(trained) * settings.batch_size)
    if seen < site.min_train_rows:
        raise Refused(
            "rows",
            f"a round would train on {seen} of {trained} rows, and min_train_rows is "
            f"{site.min_train_rows}",
        )
    if 0 < scored < site.min_score_rows:
        raise Refused(
            "rows",
            f"the run would score {scored} rows (data.client_test), and min_score_rows is "
            f"{site.min_score_rows}",
        )


def require_labels(site: SiteConfig, labels: Sequence[str]) -> None:
    """Raises Refused for labels that the operator has not agreed to."""
    if len(labels) > site.max_labels:
        raise Refused(
            "labels",
            f"the rows have {len(labels):,} labels, and max_labels is {site.max_labels}: is "
            f"{site.label!r} the column of labels?",
        )
    if long := [label for label in labels if len(label) > LABEL_LENGTH]:
        raise Refused("labels", f"the label {long[0][:20]!r}... is over {LABEL_LENGTH} characters")
    if site.labels is not None and (others := sorted(set(labels) - set(site.labels))):
        raise Refused("labels", f"the label {others[0]!r} is not among labels in site.toml")


@dataclass
class RunUse:
    """What one run has used of a site: its split of the rows, and the number of questions."""

    share: Annotated[float, Field(ge=0, lt=1)]
    seed: int
    questions: Annotated[int, Field(ge=0)]


_STORED = TypeAdapter(dict[str, RunUse])


@dataclass
class Uses:
    """What each run has used of a site, by the run's id, as in ``uses.json``."""

    site: SiteConfig
    runs: dict[str, RunUse] = field(default_factory=dict)

    @classmethod
    def read(cls, site: SiteConfig) -> Uses:
        """Those of this site so far. Refused if the file is damaged: it is never reset."""
        file = site.folder / "uses.json"
        try:
            return cls(site, _STORED.validate_json(file.read_bytes(), strict=True))
        except FileNotFoundError:
            return cls(site)
        except ValidationError:
            raise Refused("disk", f"{file} is damaged: restore it, or remove it") from None

    def admit(self, run: str, config: RunConfig, rows: int) -> None:
        """Count this run, unless it is known. Raises Refused for one too many, or its split.

        ``rows`` is the number of this site's rows. Two runs that hold out nearly the same rows
        would tell, by the difference of their metrics, about the rows that only one holds out.
        """
        share, seed = config.data.client_test or 0.0, config.seed if config.data.client_test else 0
        known = self.runs.get(run)
        if known is None and len(self.runs) >= self.site.max_runs:
            raise Refused("limit", f"{len(self.runs)} runs have been answered (max_runs)")
        if known is not None and (known.share, known.seed) != (share, seed):
            raise Refused("split", "the run has changed which rows are held out")
        if config.train.rounds > self.site.max_rounds:
            raise Refused(
                "limit", f"{config.train.rounds} rounds, and max_rounds is {self.site.max_rounds}"
            )
        least = max(self.site.min_train_rows, self.site.min_score_rows)
        mine = self._held_out(share, seed, rows)
        for other in {(use.share, use.seed) for use in self.runs.values()}:
            apart = len(mine ^ self._held_out(*other, rows))
            if 0 < apart < least:
                raise Refused(
                    "split",
                    f"the rows held out differ by {apart} from those of an earlier run, and must "
                    f"by none or at least {least} (min_train_rows, min_score_rows)",
                )
        self.runs.setdefault(run, RunUse(share, seed, 0))
        self.count(run)

    def count(self, run: str, round: int = 0) -> None:
        """Count one question of this run. Raises Refused for one too many, or an unknown run."""
        if run not in self.runs:
            raise Refused("question", "the run has not said hello")
        if self.runs[run].questions >= self.site.max_questions:
            raise Refused("limit", f"{self.site.max_questions} questions answered (max_questions)")
        if round > self.site.max_rounds:
            raise Refused("limit", f"round {round}, and max_rounds is {self.site.max_rounds}")
        self.runs[run].questions += 1
        make_folder(self.site.folder)
        stored: Mapping[str, Any] = {run: vars(use) for run, use in self.runs.items()}
        write_file(self.site.folder / "uses.json", json.dumps(stored))

    def _held_out(self, share: float, seed: int, rows: int) -> set[int]:
        _, kept = hold_out(torch.arange(rows), share, seed, self.site.name)
        return set(kept.tolist())
