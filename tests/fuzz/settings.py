"""The TOML files of a run and of a site."""

from __future__ import annotations

import tomllib

from fuzz import folder
from rolora.config.load import config_hash, dump_config, load_config
from rolora.errors import ConfigError
from rolora.sites.site_config import ROLES, read_site

_RUN = """\
name = "tiny"
server_seed = 7
[model]
path = "~/model"
dtype = "fp32"
[lora]
rank = 2
alpha = 4
target_modules = ["query", "value"]
[data]
train = ["a.csv", "b.csv"]
client_test = 0.2
[partition]
scheme = "dirichlet"
clients = 5
[method]
name = "rolora"
b_rounds = 2
[aggregate]
reducer = ["clip", "krum"]
byzantine = 1
weights = "uniform"
[aggregate.options.clip]
norm = 1.0
[train]
rounds = 4
lr = 1e-3
lr_schedule = "linear"
[eval]
every = 2
[federation]
sites = 3
labels = ["good", "bad"]
[provenance]
root = ".."
"""
_SITE = """\
name = "ann"
data = "rows.csv"
tasks = ["classification", "causal_lm"]
text = ["a", "b"]
label = "label"
labels = ["good", "bad"]
metrics = ["accuracy"]
max_labels = 7
threads = 1
state = "~/state"
superlink = "127.0.0.1:9092"
key = "ann.key"
"""
SEEDS = [b"\x00" + _RUN.encode(), b"\x01" + _SITE.encode()]
_folder = folder()


def target(data: bytes) -> None:
    """The first byte says whose file the rest is: a run's or a site's."""
    if not data:
        return
    file = _folder / "it.toml"
    file.write_bytes(data[1:])
    try:
        if data[0] & 1:
            site = read_site(file)
            assert site.roles.keys() <= set(ROLES)
            for path in (site.folder, site.path(site.key), site.path(site.certificates)):
                assert path is None or path.is_absolute()
            return
        config = load_config(file)
    except ConfigError:
        return
    text = dump_config(config, {}, _folder)
    tomllib.loads(text)
    file.write_text(text)
    again = load_config(file)
    assert again == config
    assert config_hash(again) == config_hash(config)
