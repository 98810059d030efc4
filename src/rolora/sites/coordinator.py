"""The coordinator's side of a run across sites: an experiment whose clients are elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rolora.config.schema import DataConfig, RunConfig
from rolora.data import tables
from rolora.errors import ConfigError
from rolora.flower.engine import Remote, run_id
from rolora.flower.membership import Membership, Transport
from rolora.run.experiment import Experiment, data_hash
from rolora.run.shards import Rows


def prepare_remote(
    config: RunConfig, folder: Path, transport: Transport, notify: Callable[[str], None]
) -> Experiment:
    """Wait for the sites, agree with them on labels and model, and set up the run.

    ``notify`` receives a line for each site that joins or is refused. The server's seed is drawn
    here unless it is set: sites know ``config.seed``, and must not be able to predict what is drawn
    from the other. Raises ConfigError for what is impossible across sites, NoQuorum for too few.
    """
    test_source, validation_source = _evaluation_sources(config.data)
    _refuse(config)
    if config.server_seed is None:
        config = config.model_copy(update={"server_seed": secrets.randbits(63)})
    if config.model.dtype == "auto":  # the fastest dtype differs from site to site
        dtype = "bf16" if config.device == "cuda" else "fp32"
        model = config.model.model_copy(update={"dtype": dtype})
        config = config.model_copy(update={"model": model})
    read = partial(tables.read_table, root=config.root, offline=config.offline)
    test = read(test_source, split=config.data.test_split)
    validation = None
    if validation_source is not None:
        validation = read(validation_source, split="validation")
    rows = Rows(None, test, validation, shards={}, held_out={})
    membership = Membership(transport, config, run_id(config, folder), notify)
    labels = tuple(membership.gather())
    here = Experiment(config, rows=rows, labels=labels)
    engine = Remote(membership, config, here.base, labels)
    members = engine.clients()
    return Experiment(
        config,
        rows=rows,
        labels=labels,
        base=here.base,
        engine=engine,
        partition={
            "clients": [{"id": c, "num_examples": n, "labels": {}} for c, n in members.items()],
            "dropped": 0,
            "note": "rows stay at their sites",
        },
        data=data_hash({}, here.test),
        bank=1,
        spare=config.federation.spare,
        notes=(),
    )


def _evaluation_sources(data: DataConfig) -> tuple[str, str | None]:
    """The sources of test and validation rows. ConfigError for a share of the sites' rows."""
    if isinstance(data.test, str) and not isinstance(data.validation, float):
        return data.test, data.validation
    raise ConfigError(
        "across sites data.test and data.validation must name rows that the coordinator has, not a "
        "share: the sites' rows stay with them"
    )


def _refuse(config: RunConfig) -> None:
    """ConfigError for a method or ranks that do not work across sites."""
    method = Experiment(config).method
    if not method.federated:
        raise ConfigError(
            f"{method.name} trains on all rows in one place, and the rows of sites stay with them: "
            "run it without --on, or use fedit"
        )
    if method.needs_gradient:
        raise ConfigError(
            f"{method.name} starts from a gradient over all clients' rows, which sites do not "
            "send: use ravan, which sends as little"
        )
    if config.data.validation is not None and method.personal_roles:
        raise ConfigError(
            f"{method.name} keeps a part of each adapter at its site, which does not have the "
            "coordinator's validation rows: remove data.validation; data.client_test evaluates "
            "each site's adapter on the site's own rows"
        )
    if isinstance(config.lora.rank, list):
        raise ConfigError(
            'across sites lora.rank is one number or a table of names, such as "hospital-*" = 8: '
            "sites come and go, so a list has no fixed order"
        )
