"""What a run needs, said before anything is downloaded or trained: memory, traffic, work, disk.

Nothing here is a table of methods. A method's tensors come from its own ``init``, what travels from
a dry run of its own rounds, and a step's cost from running it on shapes alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rolora.algorithm.adapter import AdapterState, Roles, layer_of, role_of
from rolora.algorithm.factors import to_peft, zero_deltas
from rolora.algorithm.method import Method
from rolora.algorithm.reduce import compose
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation
from rolora.config.schema import MethodConfig, RunConfig
from rolora.plan.dry_run import Travelled, Untrained, dry_run
from rolora.plan.estimate import Sketch, Steps, sketch
from rolora.run.experiment import Experiment
from rolora.run.folder import KEPT_CHECKPOINTS, contents
from rolora.training.client_store import KEPT_STATES
from rolora.training.engine import group_size
from rolora.training.memory import bank_size, free_bytes
from rolora.training.rounds import Best, Federation, RunState, cohort_size

DRY_BYTES = 1 << 30  # that a dry run may move, unless four rounds are more
ALIKE = 4  # clients that stand for all, where each does what every other does


@dataclass(frozen=True)
class RoundPlan:
    """One of the two kinds of rounds in the steady state. Bytes, but ``flops``.

    ``factors`` is what is trained, of ``trained`` parameters. ``up`` and ``down`` are of one client
    and round. ``flops`` are of one client's step, in multiplications and additions. ``activations``
    is what a bank keeps for the backward pass, ``optimizer`` the optimiser's state, ``peak`` what
    training takes at most: weights, adapters, optimiser and a step. None where the model's layers
    cannot be run on shapes alone.
    """

    factors: str
    trained: int
    up: float
    down: float
    flops: float | None
    activations: int | None
    optimizer: int
    peak: int | None


@dataclass(frozen=True)
class MethodPlan:
    """What a run with one method needs. Bytes, but ``flops`` and ``parameters``.

    ``parameters``: of an adapter by role. ``bank`` clients train at once, whose ``adapters`` are in
    memory. ``first_down`` is what a client receives in its first round. ``up``, ``down`` and
    ``flops`` are of the whole run (``counted`` says if every round was run dry, else the later ones
    are taken to be like the first), ``checkpoints`` of those kept, ``personal`` of what clients
    keep for themselves.
    """

    name: str
    parameters: Mapping[str, int]
    bank: int
    adapters: int
    rounds: tuple[RoundPlan, ...]
    first_down: float
    up: float
    down: float
    counted: bool
    flops: float | None
    checkpoints: int
    personal: int


@dataclass(frozen=True)
class Plan:
    """What a run needs, with each method asked about. ``weights``, ``stored``, ``cache`` in bytes.

    ``parameters`` of the base model; ``weights`` in memory in ``dtype``, ``stored`` on disk;
    ``source``: where its configuration was found. ``clients`` with ``rows`` rows (None: not known),
    ``cohort`` of them in a round, who take ``steps`` steps on average (None: not known) of
    ``tokens`` tokens. ``cache``: outputs of layers below the adapters (None: not known).
    """

    model: str
    source: str
    parameters: int
    dtype: str
    weights: int
    stored: int
    clients: int
    cohort: int
    rows: int | None
    rounds: int
    steps: float | None
    tokens: int
    cache: int | None
    methods: tuple[MethodPlan, ...]
    notes: tuple[str, ...]


def make_plan(config: RunConfig, methods: Sequence[str] = ()) -> Plan:
    """The plan of a run; ``methods`` (left out: the configured one) are set side by side.

    Needs the model's configuration only, and counts rows where they are on this machine. Raises
    ConfigError or DataError as a run would.
    """
    drawn = sketch(config)
    steps = Steps(drawn, {})
    configs = [_with_method(config, name) for name in methods] or [config]
    clients, base = len(drawn.sizes), drawn.outline.base
    planned = tuple(_method_plan(one, drawn, steps) for one in configs)
    blind = any(plan.peak is None for method in planned for plan in method.rounds)
    said = "this model cannot be run on shapes alone: activations and work are not known"
    return Plan(
        model=config.model.path,
        source=drawn.outline.source,
        parameters=sum(p.numel() for p in base.model.parameters()),
        dtype=drawn.dtype,
        weights=drawn.weights,
        stored=drawn.outline.stored_bytes,
        clients=clients,
        cohort=cohort_size(clients, config.train.participation),
        rows=None if drawn.rows is None else sum(drawn.sizes.values()),
        rounds=config.train.rounds,
        steps=drawn.steps,
        tokens=drawn.tokens,
        cache=drawn.cache,
        methods=planned,
        notes=(*drawn.notes, said) if blind else drawn.notes,
    )


def _method_plan(config: RunConfig, drawn: Sketch, steps: Steps) -> MethodPlan:
    method = Experiment(config).method
    specs = drawn.outline.base.specs
    if method.needs_gradient:  # any will do: what counts here is shapes
        any_gradient = {layer_of(name): zero + 1 for name, zero in zero_deltas(specs).items()}
        specs = replace(specs, gradient=any_gradient)
    start = method.init(specs, generator(config.seed, "init"))
    parameters = dict[str, int]()
    for name, tensor in start.items():
        parameters[role_of(name)] = parameters.get(role_of(name), 0) + tensor.numel()
    kinds = [[method.trainable(round, local) for local in (0, 1)] for round in (3, 4)]
    trained = [roles for kind in kinds for roles in kind]
    bank = 1 if not method.federated else _bank(config, drawn, steps, start, trained)
    travelled, state = _dry_run(config, method, drawn, start)
    rounds = tuple(
        _round_plan(config, drawn, steps, start, kind, bank, method, travelled[2 + parity :: 2])
        for parity, kind in enumerate(kinds)
    )
    total = config.train.rounds
    later = max(total - len(travelled), 0)
    first = travelled[:total]
    steady = travelled[2:]
    usual = sum(t.up for t in steady) / len(steady)
    usual_down = sum(t.down for t in steady) / len(steady)
    cohort = cohort_size(len(drawn.sizes), config.train.participation)
    return MethodPlan(
        name=method.name,
        parameters=parameters,
        bank=bank,
        adapters=bank * start.num_bytes(),
        rounds=rounds[:1] if kinds[0] == kinds[1] else rounds,
        first_down=travelled[0].down,
        up=round(cohort * (sum(t.up for t in first) + later * usual)),
        down=round(cohort * (sum(t.down for t in first) + later * usual_down)),
        counted=not later,
        flops=_flops(config, drawn, rounds),
        checkpoints=_checkpoints(config, state),
        personal=_personal(config, method, drawn, start),
    )


def _bank(
    config: RunConfig, drawn: Sketch, steps: Steps, start: AdapterState, trained: Sequence[Roles]
) -> int:
    """Clients that train at once, as a run on this machine would choose."""
    cohort = cohort_size(len(drawn.sizes), config.train.participation)
    if config.train.engine == "debug":
        return 1
    device, wanted = config.device, None if config.train.bank == "auto" else config.train.bank
    free = free_bytes(device) if device != "cuda" or torch.cuda.is_available() else 1 << 62
    size = bank_size(device, drawn.tokens, 0, free, cohort, wanted)
    costs = [steps.cost(start, roles, size) for roles in trained]
    kept = max((cost.activations // size for cost in costs if cost), default=0)
    return group_size(cohort, bank_size(device, drawn.tokens, kept, free, cohort, wanted))


def _round_plan(
    config: RunConfig,
    drawn: Sketch,
    steps: Steps,
    start: AdapterState,
    kind: Sequence[Roles],
    bank: int,
    method: Method,
    travelled: Sequence[Travelled],
) -> RoundPlan:
    """Of rounds whose local steps take turns in training ``kind``."""
    roles: Roles = frozenset().union(*kind)
    trained = sum(tensor.numel() for tensor in start.only(roles).values())
    states = {"adamw": 2, "sgd": 1 if config.train.momentum else 0}[config.train.optimizer]
    gradients = bank * 4 * trained
    optimizer = states * gradients
    standing = drawn.weights + bank * start.num_bytes()
    # the state is made once the first backward pass is over and what that had kept is gone
    beside = optimizer if drawn.steps != 1 or not method.federated else 0
    costs = [steps.cost(start, one, bank) for one in kind]
    known = [cost for cost in costs if cost is not None]
    flops = None
    if known:
        # the batch at hand is one of the longest
        mean = sum(cost.flops for cost in known) / len(known) / bank
        flops = mean * bank * drawn.tokens / int(drawn.batch(bank).lengths.sum())
    return RoundPlan(
        factors="+".join(sorted(roles - {"head"})) or "head",
        trained=trained,
        up=sum(t.up for t in travelled) / len(travelled),
        down=sum(t.down for t in travelled) / len(travelled),
        flops=flops,
        activations=max((cost.activations for cost in known), default=None),
        optimizer=optimizer,
        peak=max(
            (standing + max(beside + cost.peak, optimizer + gradients) for cost in known),
            default=None,
        ),
    )


def _dry_run(
    config: RunConfig, method: Method, drawn: Sketch, start: AdapterState
) -> tuple[list[Travelled], RunState]:
    """Rounds without training: all of them, or where that is much to move, the first four."""
    sizes = drawn.sizes
    if config.train.participation == 1 and isinstance(config.lora.rank, int):
        sizes = dict(itertools.islice(sizes.items(), ALIKE))
    cohort = cohort_size(len(sizes), config.train.participation)
    affordable = DRY_BYTES // (cohort * start.num_bytes())
    federation = Federation(
        method=method,
        engine=Untrained(sizes, config.wire.up),
        aggregation=Aggregation(
            compose(config.aggregate.rules), config.aggregate.weights, exactness=False
        ),
        ranks=config.lora.ranks,
        seed=config.seed,
        rounds=max(4, min(config.train.rounds, affordable)),
        lr=lambda round: 0.0,
        participation=config.train.participation,
    )
    return dry_run(federation, start)


def _flops(config: RunConfig, drawn: Sketch, rounds: Sequence[RoundPlan]) -> float | None:
    """Of all steps of all clients in all rounds."""
    cohort = cohort_size(len(drawn.sizes), config.train.participation)
    each = [plan.flops for plan in rounds if plan.flops is not None]
    if drawn.steps is None or len(each) < len(rounds):
        return None
    return config.train.rounds * cohort * drawn.steps * sum(each) / len(each)


def _checkpoints(config: RunConfig, state: RunState) -> int:
    """Bytes of the checkpoints that are kept, and of the adapter at the end."""
    adapter = state.server.adapter
    if config.data.validation is not None:
        state = replace(state, best=Best(1, 0.0, adapter))
    each = sum(tensor.nbytes for tensor in contents(state).values())
    return KEPT_CHECKPOINTS * each + to_peft(adapter).num_bytes()


def _personal(config: RunConfig, method: Method, drawn: Sketch, start: AdapterState) -> int:
    """Bytes of what clients keep on disk: personal tensors, and what uploads rounded away."""
    personal = start.only(method.personal_roles).num_bytes()
    if config.wire.up != "fp32" and method.federated:
        personal += start.only(method.shared(1) | method.shared(2)).num_bytes()
    return len(drawn.sizes) * KEPT_STATES * personal


def _with_method(config: RunConfig, name: str) -> RunConfig:
    if name == config.method.name:
        return config
    return config.model_copy(update={"method": MethodConfig(name=name)})
