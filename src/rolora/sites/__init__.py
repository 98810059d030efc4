"""What operators run: sites, the coordinator, keys, checks, and a trial on one machine."""

from importlib.util import find_spec

from rolora.errors import ConfigError

if find_spec("flwr") is None:
    raise ConfigError("runs across sites need Flower: pip install 'rolora[flower]'")
