"""One run as a site sees it: its configuration with the site's own places, its model, its rows."""

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
from rolora.data.shards import hold_out
from rolora.flower.message import ParcelError
from rolora.model.base import Base
from rolora.model.prefix import kept_below
from rolora.run.configured import load_base_for, local_settings, make_method, make_task
from rolora.sites.site_config import SiteConfig
from rolora.training.client_store import ClientStore
from rolora.training.engine import InProcess


@dataclass(frozen=True)
class SiteRun:
    """One run at one site, as far as it has been told of it."""

    site: SiteConfig
    config: RunConfig
    labels: tuple[Any, ...]
    store: ClientStore

    @cached_property
    def base(self) -> Base:
        """The base model here, with a bank of one."""
        base = load_base_for(self.config, self.labels)
        if base.stack is not None:
            base.stack.checkpointing = self.config.train.recompute
        return base

    @cached_property
    def method(self) -> Method:
        """The run's method."""
        return make_method(self.config)

    def view_of_rank(self, rank: int) -> AdapterState:
        """Names and shapes of what a client of this rank is sent; the values are the start's."""
        rng = generator(self.config.seed, "init")
        start = ServerState(self.method.init(self.base.specs, rng))
        return self.method.download(start, ClientInfo(self.site.name, 0, rank, 1))

    @cached_property
    def engine(self) -> InProcess:
        """Local training and evaluation, exactly as in a run on one machine."""
        config, site = self.config, self.site
        task = make_task(config, self.base, self.labels)
        table = table_here(site)
        rows, kept = split_here(config, site, table.num_rows)
        examples = task.encode(table, site.data)
        if config.train.cache:
            folder = site.folder / "cache"
            folder.mkdir(parents=True, exist_ok=True)
            examples, _ = kept_below(self.base, examples, folder)
        held_out = {}
        if len(kept):
            held_out[site.name] = task.encode_test(table.take(kept.tolist()), site.data)
        return InProcess(
            self.base,
            task,
            examples,
            {site.name: rows},
            local_settings(config),
            self.store,
            bank_size=1,
            held_out=held_out,
            up=None,
        )


def config_here(site: SiteConfig, folder: Path) -> RunConfig:
    """The run's configuration with this site's own places in it."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ParcelError("this site has not been told of the run") from None
    except ValueError:
        raise ParcelError("the run's configuration is not valid JSON") from None
    config = make_config(values, root=site.root)
    own: dict[str, Any] = {"train": site.data}
    if site.text is not None:
        own["text"] = site.text
    if site.label is not None:
        own["label"] = site.label
    model = {} if site.model is None else {"path": site.model}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=own),
            "model": config.model.model_copy(update=model),
            "device": site.device,
        }
    )


def table_here(site: SiteConfig) -> Any:
    """The site's rows as a pyarrow table, with the columns that a run may read and no other.

    Raises DataError if the file, or one of these columns, is missing.
    """
    table = tables.read_table(site.data, root=site.root)
    if site.columns is None:
        return table
    tables.require_columns(table, site.columns, site.data)
    return table.select(site.columns)


def split_here(config: RunConfig, site: SiteConfig, rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers to train on, and those that are held out; the draws of a run on one machine."""
    return hold_out(torch.arange(rows), config.data.client_test or 0, config.seed, site.name)
