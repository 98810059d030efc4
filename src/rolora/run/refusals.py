"""Settings that do not go together: each is a ConfigError, in one line that says what to change.

The schema refuses what can be seen in the configuration alone. Here it is seen beside the method
and the clients.
"""

from __future__ import annotations

from collections.abc import Mapping

from rolora.algorithm.choices import SERVER_OPTIMIZERS
from rolora.algorithm.method import Method
from rolora.algorithm.step import Aggregation
from rolora.attacks.attack import Attack
from rolora.config.schema import RunConfig, TrainConfig
from rolora.errors import ConfigError, nearest
from rolora.methods import get_method, method_names
from rolora.run.settings import local_settings


def require_supported(
    method: Method, config: RunConfig, aggregation: Aggregation, attack: Attack | None
) -> None:
    """ConfigError for a setting that this method does not support."""
    uneven, rules = (
        not isinstance(config.lora.rank, int),
        [name for name, _ in config.aggregate.rules],
    )
    if uneven and not method.heterogeneous_ranks:
        raise ConfigError(
            f"{method.name} does not support clients of different ranks: set lora.rank to one "
            f"number, or use one of {_methods('heterogeneous_ranks')}"
        )
    optimizers = [name for name in rules if name in SERVER_OPTIMIZERS]
    if optimizers and not method.supports_server_optimizer:
        raise ConfigError(
            f"{method.name} does not support the server optimizer {optimizers[0]!r}, since its "
            "server does more than average what clients send: remove it, or use one of "
            f"{_methods('supports_server_optimizer')}"
        )
    rule = next((name for name in rules if name in ("nnm", "bucketing")), rules[-1])
    if rule != "mean" and (method.sparse_upload or (uneven and not method.whole_products)):
        raise ConfigError(
            f"{method.name} averages pieces that not every client sends, and {rule!r} would "
            "count a missing piece as a vote for no change: set aggregate.reducer to 'mean', or "
            "use rolora with one lora.rank"
        )
    if aggregation.reducer.least > 1 and not method.federated:
        raise ConfigError(
            f"{method.name} trains on the rows of all clients together, so {rule!r} has no "
            "one to leave out: set aggregate.reducer to 'mean' and aggregate.byzantine to 0"
        )
    forges = attack is not None and attack.forge is not None
    if attack is not None and (not method.federated or (forges and not method.shared(1))):
        raise ConfigError(
            f"{method.name} combines nothing that clients send, so there is nothing to "
            "attack: remove [attack]"
        )
    if forges and uneven:
        raise ConfigError(
            "[attack] forges updates from the moves of all clients: set lora.rank to one number"
        )
    if config.train.keep_moments and method.resets_factors:
        raise ConfigError(
            f"{method.name} makes new factors each round, so the optimizer's state of "
            "the old ones is useless: set train.keep_moments to false"
        )
    require_turns(method, config.train, {})  # of each client once its rows are known


def require_clients(
    method: Method,
    config: RunConfig,
    aggregation: Aggregation,
    sizes: Mapping[str, int],
    cohort: int,
) -> None:
    """ConfigError for ranks, steps, a quorum or a trusted client that do not fit the clients.

    ``sizes``: client -> its number of rows; ``cohort``: clients of a round.
    """
    config.lora.ranks(sizes)
    require_turns(method, config.train, sizes)
    how, drawn = config.aggregate, f"(train.participation of {len(sizes)} clients)"
    if how.trusted is not None and how.trusted not in sizes:
        raise ConfigError(
            f"aggregate.trusted = {how.trusted!r} is not a client of this run: "
            f"{nearest(how.trusted, sizes)}"
        )
    if how.quorum > cohort:
        raise ConfigError(
            f"aggregate.quorum = {how.quorum} can never be met by a cohort of {cohort} {drawn}"
        )
    least = aggregation.reducer.least
    if least > cohort and method.federated:
        names = [name for name, _ in how.rules]
        raise ConfigError(
            f"aggregate.reducer {names} needs {least} updates a round to withstand {how.byzantine} "
            f"bad ones (aggregate.byzantine), but a cohort has {cohort} {drawn}"
        )


def require_turns(method: Method, train: TrainConfig, sizes: Mapping[str, int]) -> None:
    """ConfigError if a client takes one step a round where factors take turns between steps.

    ``sizes``: client -> its number of rows, by which epochs count their steps.
    """
    settings = local_settings(train)
    if method.trainable(1, 0) == method.trainable(1, 1):
        return
    if train.local_steps == 1:
        raise ConfigError(
            f"{method.name} alternates factors between local steps: set train.local_steps to at "
            "least 2"
        )
    for client, rows in sizes.items():
        if settings.num_steps(rows) == 1:
            raise ConfigError(
                f"{method.name} alternates factors between local steps, but client {client!r} with "
                f"{rows} rows takes one a round: set train.local_epochs to at least 2, or lower "
                "train.batch_size"
            )


def _methods(trait: str) -> str:
    """The names of the methods of which this is true."""
    return ", ".join(name for name in method_names() if getattr(get_method(name), trait))
