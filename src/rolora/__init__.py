"""Federated LoRA fine-tuning with exact averages: RoLoRA, its baselines, a PEFT adapter at the end.

A run is a TOML file: ``rolora.start(rolora.load_config("run.toml")).rounds()`` trains it round by
round. ``help(rolora.federate)`` shows a federation on a model and a training loop of your own,
``help(rolora.attach)`` the client bank by itself. The public names are those of ``__init__.pyi``;
each is imported when it is first used, so that ``import rolora`` stays light.

>>> import rolora
>>> rolora.get_method("rolora").name
'rolora'
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("rolora")
