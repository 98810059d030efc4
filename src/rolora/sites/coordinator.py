"""The coordinator's side of a run across sites: what ``rolora.run.runs`` does, with other hands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rolora.algorithm.method import Method, ServerState
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.errors import ConfigError
from rolora.flower.engine import Remote, run_id
from rolora.flower.membership import Carrier, Roster
from rolora.run.build import Setup, data_hash, load_in_dtype
from rolora.run.configured import first_adapter, make_method, make_task
from rolora.run.federation import evaluation, federation_of, score
from rolora.training.rounds import RunState


def prepare_remote(
    config: RunConfig, folder: Path, carrier: Carrier, tell: Callable[[str], None]
) -> Setup:
    """Wait for the sites, agree with them on labels and model, and build the run.

    ``tell`` gets a line for every site that joins or is refused.
    Raises ConfigError for what cannot be done across sites, NoQuorum if too few of them come.
    """
    test_source, validation_source = _evaluation_sources(config)
    method = make_method(config)
    _refuse(config, method)
    if config.model.dtype == "auto":  # what the fastest dtype is differs from site to site
        dtype = "bf16" if config.device == "cuda" else "fp32"
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"dtype": dtype})}
        )
    read = partial(tables.read_table, root=config.root, offline=config.offline)
    test_rows = read(test_source, split=config.data.test_split)
    roster = Roster(carrier, config, run_id(config, folder), tell)
    labels = roster.gather()
    base, notes = load_in_dtype(config, test_rows, labels)
    task = make_task(config, base, labels)
    test = task.encode_test(test_rows, test_source)
    validation = None
    if validation_source is not None:
        rows = read(validation_source, split="validation")
        validation = task.encode_test(rows, validation_source)
    if config.eval.rows == "validation" and validation is not None:
        test = validation
    engine = Remote(roster, config, base, tuple(labels))
    members = engine.clients()
    return Setup(
        config=config,
        base=base,
        task=task,
        test_rows=test_rows,
        federation=federation_of(
            config,
            method,
            engine,
            evaluation(config.eval, partial(score, base, task), test, validation),
            task,
            per_client=config.data.client_test is not None,
            spare=config.federation.spare,
        ),
        start=RunState(ServerState(first_adapter(config, method, base))),
        labels=tuple(labels),
        partition={
            "clients": [{"id": c, "num_examples": n, "labels": {}} for c, n in members.items()],
            "dropped": 0,
            "note": "rows stay at their sites",
        },
        data=data_hash({}, test),
        bank=1,
        cached=False,
        notes=notes,
    )


def _evaluation_sources(config: RunConfig) -> tuple[str, str | None]:
    """The coordinator's test and validation rows. ConfigError if they would be the sites'."""
    where = config.data
    if isinstance(where.test, str) and not isinstance(where.validation, float):
        return where.test, where.validation
    raise ConfigError(
        "across sites data.test, and data.validation if there is one, must name rows that the "
        "coordinator has: none can be cut off from those of the sites"
    )


def _refuse(config: RunConfig, method: Method) -> None:
    """ConfigError for a method, or ranks, that sites cannot have."""
    if method.needs_gradient:
        raise ConfigError(
            f"{method.name} starts from a gradient over all clients' rows, which sites are not "
            "asked for: take ravan, whose cores are as small"
        )
    if config.data.validation is not None and method.personal_roles:
        raise ConfigError(
            f"{method.name} leaves a part of each adapter at its site, which has none of the "
            "coordinator's validation rows: leave out data.validation; data.client_test measures "
            "each site's adapter on rows of its own"
        )
    if isinstance(config.lora.rank, list):
        raise ConfigError(
            'across sites lora.rank is one number or a table of names, such as "hospital-*" = 8: '
            "sites come and go, so a list has no order to be dealt out in"
        )
