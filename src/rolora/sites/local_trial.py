"""A configuration's rows split among site folders, to try its run across sites on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tomli_w
import torch

from rolora.config.load import load_config
from rolora.data import tables
from rolora.files import from_home, write_file
from rolora.run.experiment import Experiment
from rolora.sites.folder import FederationFolder
from rolora.sites.keys import LOOPBACK
from rolora.sites.site_config import ROLES


def make_trial(path: Path, file: str, overrides: Sequence[str], sites: int, port: int) -> None:
    """Make a federation folder for this machine: keys, each site's rows, and ``run.toml``.

    The rows are split as the configuration says, among ``sites`` clients unless the partition
    fixes their number. Sites have the clients' names, so ``run.toml`` gives the same adapter with
    and without ``--on``.
    """
    config = load_config(file, overrides)
    if config.partition.scheme in ("iid", "dirichlet", "by_label"):
        config = load_config(file, [*overrides, f"partition.clients={sites}"])
    experiment = Experiment(config)
    rows, columns = experiment.rows, experiment.columns
    folder = FederationFolder.create(path, LOOPBACK[0], port)
    model = (config.root / from_home(config.model.path)).resolve()
    for name, shard in rows.shards.items():
        site = folder.add_site(name)
        held = rows.held_out.get(name, torch.empty(0, dtype=torch.int64))
        chosen = torch.cat([shard, held]).sort().values
        tables.write_table(rows.train.take(chosen.tolist()), site / f"{name}.parquet")
        mine = {
            "name": name,
            "data": f"{name}.parquet",
            "tasks": [config.model.task],
            **{role: column for role, column in columns.items() if role in ROLES},
            "min_train_rows": 1,
            "min_score_rows": 1,
            "max_runs": 10_000,  # your own rows
            "device": config.device,
            "threads": 1,
            "superlink": f"{folder.host}:{port}",
            "certificates": "ca.crt",
            "key": f"{name}.key",
            "state": "state",
        }
        write_file(site / "site.toml", tomli_w.dumps(mine))
    values = config.model_dump(mode="json", exclude_none=True)
    values["name"] = f"{config.name}-at-sites"  # both may be run, from one folder
    values["server_seed"] = config.seed if config.server_seed is None else config.server_seed
    values["model"]["path"] = str(model) if model.exists() else config.model.path
    values["data"]["train"] = "sites/*/*.parquet"
    for key in ("test", "second_test", "validation"):
        if (held := getattr(rows, key)) is not None:
            tables.write_table(held, folder.path / f"{key}.parquet")
            values["data"][key] = f"{key}.parquet"
    values["partition"] = {"scheme": "files"}
    values["track"] = config.track.model_dump(exclude_none=True)
    values["federation"]["sites"] = len(rows.shards)
    write_file(folder.path / "run.toml", tomli_w.dumps(values))
