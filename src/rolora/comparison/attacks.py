"""Methods under attacks: a comparison for each attack and rule, with the same bad clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.algorithm.choices import REDUCERS
from rolora.attacks import ATTACKS, NO_ATTACK
from rolora.comparison.grid import Comparison, plan
from rolora.comparison.variants import checked_labels, method_of, variant_overrides
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError
from rolora.results.robustness import Cell, matrix
from rolora.results.runs import RunRecord, load_run, sorted_out
from rolora.tasks.registry import task_kind

RULES = ("mean", "nnm+trimmed_mean")


@dataclass(frozen=True)
class UnderAttack:
    """The comparison of all methods under one attack and one rule, in a folder of its own."""

    attack: str
    rule: str
    path: Path
    comparison: Comparison


def known_attacks(config: RunConfig) -> list[str]:
    """The attacks that can be run on this configuration's task."""
    one_label = task_kind(config.model.task).name == "classification"
    names = ATTACKS.names()
    return [name for name in names if one_label or ATTACKS.make(name).spoil is None]


def plan_attacks(
    config: RunConfig,
    out: Path,
    *,
    methods: Mapping[str, Sequence[str]],
    attacks: Sequence[str],
    rules: Sequence[str] = RULES,
    bad: int = 1,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[UnderAttack]:
    """The comparison of ``methods`` for each attack and rule; first those without an attack.

    Without ``attacks`` only the rules differ. ``methods`` maps each to its own overrides. An attack
    is a name, or ``NAME+OPTION=VALUE``; a rule is a name of a reducer, or ``STEP+RULE``, and is
    told to withstand ``bad`` clients. ConfigError for anything that cannot be run.
    """
    if config.attack.name != NO_ATTACK:
        raise ConfigError("[attack] is set by this command: remove it from the configuration")
    found = []
    given = checked_labels(attacks) if attacks else []
    for attack in (NO_ATTACK, *(one for one in given if one != NO_ATTACK)):
        own = [f"attack.name={method_of(attack)}", f"attack.clients={bad}"]
        own = [] if attack == NO_ATTACK else [*own, *variant_overrides(attack, "attack")]
        for rule in checked_labels(rules):
            names = rule.split("+")
            asks = any("byzantine" in REDUCERS.options(name) for name in names)
            told = [f"aggregate.byzantine={bad if asks else 0}"]
            cell = make_config(
                config.model_dump(mode="json", exclude_none=True),
                [f"aggregate.reducer={json.dumps(names)}", *told, *own],
                root=config.root,
            ).model_copy(update={"track": config.track})
            path = out / attack.replace("/", "_") / rule
            found.append(UnderAttack(attack, rule, path, plan(cell, methods, seeds)))
    return found


def attacked_cells(comparisons: Sequence[UnderAttack]) -> tuple[list[Cell], str, list[RunRecord]]:
    """The results of these comparisons, the metric that they are measured by, and their runs.

    AllDiverged if every run diverged.
    """
    runs = {
        (one.attack, one.rule, method): [
            load_run(run.path)
            for run in one.comparison.final_runs(one.path, None)
            if run.method == method
        ]
        for one in comparisons
        for method in one.comparison.methods
    }
    every = [run for each in runs.values() for run in each]
    metric = sorted_out(every).metric
    return matrix(runs, metric), metric, every
