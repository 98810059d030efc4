"""One run at a site: its configuration with the site's paths, its model, its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.seeding import generator
from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.flower.message import MessageError
from rolora.run.experiment import Experiment, local_settings
from rolora.run.shards import Rows, hold_out
from rolora.sites.site_config import SiteConfig
from rolora.training.client_store import ClientStore
from rolora.training.engine import InProcess


@dataclass(frozen=True)
class SiteRun:
    """One run at one site."""

    site: SiteConfig
    config: RunConfig
    labels: tuple[Any, ...]
    store: ClientStore

    @cached_property
    def experiment(self) -> Experiment:
        """The run's parts, of this site's rows."""
        table = table_here(self.site)
        rows, kept = split_here(self.config, self.site, table.num_rows)
        name = self.site.name
        held_out = {name: kept} if len(kept) else {}
        here = Rows(table, None, None, shards={name: rows}, held_out=held_out)
        return Experiment(self.config, rows=here, labels=self.labels)

    @cached_property
    def method(self) -> Method:
        """The run's method."""
        return self.experiment.method

    def view_of_rank(self, rank: int) -> AdapterState:
        """An adapter with the names and shapes of what a client of this rank is sent."""
        specs, rng = self.experiment.base.specs, generator(self.config.seed, "init")
        start = ServerState(self.method.init(specs, rng))
        return self.method.download(start, ClientInfo(self.site.name, 0, rank, 1))

    @cached_property
    def engine(self) -> InProcess:
        """Local training and evaluation, exactly as in a run on one machine."""
        parts = self.experiment
        return InProcess(
            parts.base,
            parts.task,
            parts.examples,
            parts.rows.shards,
            local_settings(self.config.train),
            self.store,
            bank_size=1,
            held_out=parts.held_out,
            up=None,
        )


def config_here(site: SiteConfig, folder: Path) -> RunConfig:
    """The run's configuration with this site's paths and columns."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise MessageError("this site has not received the run's configuration") from None
    except ValueError:
        raise MessageError("the run's configuration is not valid JSON") from None
    config = make_config(values, root=site.root)
    own: dict[str, Any] = {"train": site.data}
    if site.text is not None:
        own["text"] = site.text
    if site.label is not None:
        own["label"] = site.label
    model = {} if site.model is None else {"path": site.model}
    cache = str((site.folder / "cache").resolve()) if config.train.cache else ""
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"cache": cache}),
            "data": config.data.model_copy(update=own),
            "model": config.model.model_copy(update=model),
            "device": site.device,
        }
    )


def table_here(site: SiteConfig) -> Any:
    """The site's rows as a pyarrow table with only the columns that a run may read.

    Raises DataError if the file, or one of these columns, is missing.
    """
    table = tables.read_table(site.data, root=site.root)
    if site.columns is None:
        return table
    tables.require_columns(table, site.columns, site.data)
    return table.select(site.columns)


def split_here(config: RunConfig, site: SiteConfig, rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers to train on, and held-out ones; drawn as in a run on one machine."""
    return hold_out(torch.arange(rows), config.data.client_test or 0, config.seed, site.name)
