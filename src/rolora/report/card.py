"""A finished run's model card: what its adapter or merged model says about itself, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.config.schema import LoraConfig
from rolora.report.page import templates
from rolora.results.runs import MEGABYTE, RunRecord

LABELS = 20  # as many are named
KEPT = {"A": "lora_A", "B": "lora_B", "head": "head"}


@dataclass(frozen=True)
class Source:
    """What an adapter belongs to: the base and its weights' ``digest``, and what the run trained.

    ``base`` is a hub's name or a path; ``licence`` None if the base does not state one; ``kept``
    are the roles that each client keeps for itself: "A", "B", "head".
    """

    base: str
    digest: str
    licence: str | None
    layers: Sequence[str]
    labels: Sequence[str]
    causal: bool
    kept: Sequence[str]


def card(run: RunRecord, round: int, source: Source, *, merged: bool = False) -> str:
    """The card of the adapter after this round, with the YAML header that hubs read.

    ``merged``: of the base with the adapter in its weights. Clients are counted, not named, and
    paths are left out: cards are made to be shared.
    """
    local, path = Path(source.base).is_absolute(), Path(run.config["model"]["path"])
    sizes = [client["num_examples"] for client in run.partition["clients"]]
    errors = [e for line in run.rounds if (e := line["aggregation_error"]) is not None]
    labels = ", ".join(source.labels[:LABELS])
    more = len(source.labels) - LABELS
    metrics: dict[str, float] = next(
        (line["metrics"] for line in run.rounds if line["round"] == round), {}
    )
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            name=run.name,
            merged=merged,
            hub_name="" if local else source.base,
            base=path.name if local else source.base,
            gguf=path.name if path.suffix == ".gguf" else "",
            digest=source.digest,
            licence=source.licence,
            causal=source.causal,
            task=run.config["model"]["task"],
            labels=labels + (f" and {more} more" if more > 0 else ""),
            method=run.method,
            judged_on=run.config.get("eval", {}).get("rows", "test"),
            kept=" and ".join(KEPT[role] for role in source.kept),
            rank=LoraConfig.model_validate(run.config["lora"]).largest,
            alpha=run.config["lora"]["alpha"],
            layers=", ".join(sorted({path.rpartition(".")[2] for path in source.layers})),
            clients=len(sizes),
            rows=sum(sizes),
            least=min(sizes),
            most=max(sizes),
            rounds=run.done,
            round=round,
            seed=run.seed,
            up=sum(line["bytes_up"] for line in run.rounds) / MEGABYTE,
            down=sum(line["bytes_down"] for line in run.rounds) / MEGABYTE,
            error=max(errors, default=None),
            metrics=metrics,
            second=next((name.partition("/")[2] for name in metrics if "/" in name), ""),
            version=run.provenance["versions"]["rolora"],
        )
    )
