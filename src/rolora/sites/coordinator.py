"""The coordinator's side of a run across sites: an experiment whose clients are elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from rolora.config.load import read_toml
from rolora.data import tables
from rolora.errors import ConfigError
from rolora.flower.engine import Remote
from rolora.flower.membership import Membership, Transport
from rolora.run.experiment import Experiment, data_hash
from rolora.run.runs import Build
from rolora.run.shards import Rows

Names = Callable[[], Mapping[int, str] | None]


def across(
    transport: Transport,
    notify: Callable[[str], None],
    registered: Names = lambda: None,
    expect: Callable[[int], None] = lambda size: None,
) -> Build:
    """What sets up a run on the sites of ``transport``, for ``runs.start`` and ``runs.resume``.

    It raises ConfigError for what is impossible across sites, and NoQuorum for too few; ``notify``
    receives a line for each site that joins or is refused. ``registered`` gives the site's name for
    each node whose key is known, or None where sites need no key. ``expect`` is told the bytes of
    the largest message that a site may send.
    """
    return lambda config, folder: _prepare(
        Experiment(config), folder, transport, notify, registered, expect
    )


def _prepare(
    wanted: Experiment,
    folder: Path,
    transport: Transport,
    notify: Callable[[str], None],
    registered: Names,
    expect: Callable[[int], None],
) -> Experiment:
    """Wait for the sites, and agree with them on labels and model.

    The server's seed is drawn here unless it is set: sites know the other seed, and must not be
    able to predict what is drawn from this one.
    """
    _refuse(wanted)
    config = wanted.config
    if (trusted := config.aggregate.trusted) is not None and registered() is None:
        raise ConfigError(
            f"aggregate.trusted = {trusted!r}, but sites have no keys here, so that any site could "
            "take this name: use a folder that rolora federation keys has made"
        )
    if config.server_seed is None:
        config = config.model_copy(update={"server_seed": secrets.randbits(63)})
    if config.model.dtype == "auto":  # the fastest dtype differs from site to site
        dtype = "bf16" if config.device == "cuda" else "fp32"
        model = config.model.model_copy(update={"dtype": dtype})
        config = config.model_copy(update={"model": model})
    data = config.data
    read = partial(
        tables.read_table,
        root=config.root,
        offline=config.offline,
        form=data.form,
    )
    test = read(str(data.test), split=data.test_split)
    validation = None
    if data.validation is not None:
        validation = read(str(data.validation), split="validation")
    second = data.second_test and read(data.second_test, split=data.second_split or "test")
    rows = Rows(None, test, validation, shards={}, held_out={}, second_test=second)
    run = _run_id(folder.parent / "config.toml")
    membership = Membership(transport, Experiment(config), run, notify, registered)
    membership.gather()
    while True:
        labels = wanted.ordered(membership.labels())
        here = Experiment(config, rows=rows, labels=labels)
        membership.load_model(here.base, labels)
        engine = Remote(membership, here, expect)
        members = engine.clients()
        if wanted.ordered(membership.labels()) == labels:
            break  # otherwise a site that was refused had a label that no other has
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
        data=data_hash({}, labels, here.test, here.validation, here.second),
        run=run,
        bank=1,
        spare=config.federation.spare,
        notes=[note for note in (here.base.note,) if note],
    )


def _run_id(file: Path) -> str:
    """The name of a run at its sites: drawn at its start, then as its ``config.toml`` has it."""
    if not file.is_file():
        return secrets.token_hex(8)
    run = read_toml(file).get("provenance", {}).get("run")
    if not isinstance(run, str) or not run:
        raise ConfigError(f"{file} is of a run on one machine: resume it without federation.on")
    return run


def _refuse(wanted: Experiment) -> None:
    """ConfigError for rows, a method or ranks that do not work across sites."""
    data, method = wanted.config.data, wanted.method
    if not isinstance(data.test, str) or isinstance(data.validation, float):
        raise ConfigError(
            "across sites data.test and data.validation must name rows that the coordinator has, "
            "not a share: the sites' rows stay with them"
        )
    if not method.federated:
        raise ConfigError(
            f"{method.name} trains on all rows in one place, and the rows of sites stay with them: "
            "run it without --on, or use fedit"
        )
    if wanted.kind.compares and wanted.config.lora.init_from is not None:
        raise ConfigError(
            f"task {wanted.kind.name!r} compares with the model before training, and sites do not "
            "have the adapter of lora.init_from: merge it into the model first, or remove it"
        )
    if method.needs_gradient:
        raise ConfigError(
            f"{method.name} starts from a gradient over all clients' rows, which sites do not "
            "send: use ravan, which sends as little"
        )
    if data.validation is not None and method.personal_roles:
        raise ConfigError(
            f"{method.name} keeps a part of each adapter at its site, which does not have the "
            "coordinator's validation rows: remove data.validation; data.client_test evaluates "
            "each site's adapter on the site's own rows"
        )
    if isinstance(wanted.config.lora.rank, list):
        raise ConfigError(
            'across sites lora.rank is one number or a table of names, such as "hospital-*" = 8: '
            "sites come and go, so a list has no fixed order"
        )
