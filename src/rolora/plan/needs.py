"""What a run needs, before anything is downloaded or trained: memory, traffic, work and disk.

There is no table of methods: a method's tensors come from its ``init``, its traffic from a dry run
of its rounds, and the cost of a step from running it on shapes alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from rolora.algorithm.adapter import AdapterState, Roles, layer_of, role_of
from rolora.algorithm.factors import to_peft, zero_deltas
from rolora.algorithm.method import Method
from rolora.algorithm.reduce import compose
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation
from rolora.config.schema import MethodConfig, RunConfig
from rolora.plan.dry_run import Travelled, Untrained, dry_run
from rolora.plan.estimate import Estimate, estimate_run
from rolora.run.experiment import Experiment
from rolora.run.folder import KEPT_CHECKPOINTS, contents
from rolora.training.client_store import KEPT_STATES
from rolora.training.engine import group_size
from rolora.training.memory import bank_size, free_bytes
from rolora.training.rounds import Best, Federation, RunState, cohort_size

DRY_BYTES = 1 << 30  # the most that a dry run moves, unless four rounds move more
ALIKE = 4  # clients that stand for all where all do the same


@dataclass(frozen=True)
class RoundPlan:
    """One of the two kinds of rounds in the steady state. All in bytes except ``flops``.

    ``factors``: what is trained, with ``trained`` parameters. ``up`` and ``down``: per client and
    round. ``flops``: one client's step. ``activations``: what a bank keeps for the backward pass.
    ``optimizer``: the optimiser's state. ``peak``: the most that training takes, with weights,
    adapters, optimiser and a step. None if the model cannot run on shapes alone.
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
    """What a run with one method needs. All in bytes except ``flops`` and ``parameters``.

    ``parameters``: of an adapter, by role. ``bank``: clients that train at once, with their
    ``adapters`` in memory. ``first_down``: what a client receives in its first round. ``up``,
    ``down`` and ``flops``: of the whole run, where ``counted`` says whether every round was run dry
    (otherwise later rounds are assumed to be like the first). ``checkpoints``: those kept on disk,
    with the final adapter. ``personal``: what clients keep on disk.
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
    """What a run needs, for each method asked about. ``weights``, ``stored``, ``cache`` in bytes.

    ``parameters``: of the base model. ``weights``: in memory, in ``dtype``; ``stored``: on disk.
    ``source``: where its configuration was found. ``clients`` have ``rows`` rows in all (None:
    unknown); a round has ``cohort`` of them, each with ``steps`` steps on average (None: unknown)
    of ``tokens`` tokens. ``cache``: outputs of the layers below the adapters (None: unknown).
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
    """The plan of a run, for each of ``methods`` (default: the configured one).

    Needs the model's configuration only; rows are counted if they are on this machine. Raises
    ConfigError or DataError as a run would.
    """
    run = estimate_run(config)
    configs = [_with_method(config, name) for name in methods] or [config]
    planned = tuple(_method_plan(replace(run, config=one)) for one in configs)
    notes = run.notes
    if any(plan.peak is None for method in planned for plan in method.rounds):
        notes += ("this model cannot be run on shapes alone: activations and work are unknown",)
    return Plan(
        model=config.model.path,
        source=run.outline.source,
        parameters=sum(p.numel() for p in run.outline.base.model.parameters()),
        dtype=run.dtype,
        weights=run.weights,
        stored=run.outline.stored_bytes,
        clients=len(run.sizes),
        cohort=run.cohort,
        rows=None if run.rows is None else sum(run.sizes.values()),
        rounds=config.train.rounds,
        steps=run.steps,
        tokens=run.tokens,
        cache=run.cache,
        methods=planned,
        notes=notes,
    )


def _method_plan(run: Estimate) -> MethodPlan:
    method = Experiment(run.config).method
    start = _start(run, method)
    parameters = dict[str, int]()
    for name, tensor in start.items():
        parameters[role_of(name)] = parameters.get(role_of(name), 0) + tensor.numel()
    kinds = [[method.trainable(round, local) for local in (0, 1)] for round in (3, 4)]
    bank = _bank(run, start, kinds[0] + kinds[1]) if method.federated else 1
    travelled, state = _dry_run(run, method, start)
    rounds = tuple(
        _round_plan(run, start, kind, bank, method, travelled[2 + parity :: 2])
        for parity, kind in enumerate(kinds)
    )
    flops = [plan.flops for plan in rounds if plan.flops is not None]
    known = run.steps is not None and len(flops) == len(rounds)
    steps = run.config.train.rounds * run.cohort * (run.steps or 0)
    return MethodPlan(
        name=method.name,
        parameters=parameters,
        bank=bank,
        adapters=bank * start.num_bytes(),
        rounds=rounds[:1] if kinds[0] == kinds[1] else rounds,
        first_down=travelled[0].down,
        up=_total([each.up for each in travelled], run.config.train.rounds, run.cohort),
        down=_total([each.down for each in travelled], run.config.train.rounds, run.cohort),
        counted=len(travelled) >= run.config.train.rounds,
        flops=steps * fmean(flops) if known else None,
        checkpoints=_checkpoints(run, state),
        personal=_personal(run, method, start),
    )


def _start(run: Estimate, method: Method) -> AdapterState:
    """What clients start from; a gradient, if needed, is made up, since only shapes matter."""
    specs = run.outline.base.specs
    if method.needs_gradient:
        gradient = {layer_of(name): zero + 1 for name, zero in zero_deltas(specs).items()}
        specs = replace(specs, gradient=gradient)
    return method.init(specs, generator(run.config.seed, "init"))


def _total(each: Sequence[float], rounds: int, cohort: int) -> int:
    """Bytes of a cohort in all rounds; rounds not in ``each`` are like those from the third on."""
    later = max(rounds - len(each), 0)
    return round(cohort * (sum(each[:rounds]) + later * fmean(each[2:])))


def _bank(run: Estimate, start: AdapterState, trained: Sequence[Roles]) -> int:
    """Clients that train at once, as a run on this machine would choose."""
    if run.config.train.engine == "debug":
        return 1
    device, wanted = run.config.device, run.config.train.bank
    free = free_bytes(device) if device != "cuda" or torch.cuda.is_available() else 1 << 62
    size = bank_size(device, run.tokens, 0, free, run.cohort, wanted)
    costs = [run.cost(start, roles, size) for roles in trained]
    kept = max((cost.activations // size for cost in costs if cost), default=0)
    return group_size(run.cohort, bank_size(device, run.tokens, kept, free, run.cohort, wanted))


def _round_plan(
    run: Estimate,
    start: AdapterState,
    kind: Sequence[Roles],
    bank: int,
    method: Method,
    travelled: Sequence[Travelled],
) -> RoundPlan:
    """A round whose local steps alternate between the roles in ``kind``."""
    roles: Roles = frozenset().union(*kind)
    trained = sum(tensor.numel() for tensor in start.only(roles).values())
    states = {"adamw": 2, "sgd": 1 if run.config.train.momentum else 0}[run.config.train.optimizer]
    gradients = bank * 4 * trained
    optimizer = states * gradients
    permanent = run.weights + bank * start.num_bytes()
    # the state is allocated after the first backward pass, when its activations are gone
    during = optimizer if run.steps != 1 or not method.federated else 0
    costs = [cost for one in kind if (cost := run.cost(start, one, bank)) is not None]
    flops = None
    if costs:  # of a batch that is one of the longest
        tokens = int(run.batch(bank).lengths.sum())
        flops = fmean(cost.flops for cost in costs) * run.tokens / tokens
    peaks = [permanent + max(during + cost.peak, optimizer + gradients) for cost in costs]
    return RoundPlan(
        factors="+".join(sorted(roles - {"head"})) or "head",
        trained=trained,
        up=fmean(each.up for each in travelled),
        down=fmean(each.down for each in travelled),
        flops=flops,
        activations=max((cost.activations for cost in costs), default=None),
        optimizer=optimizer,
        peak=max(peaks, default=None),
    )


def _dry_run(
    run: Estimate, method: Method, start: AdapterState
) -> tuple[list[Travelled], RunState]:
    """All rounds without training, or only some, at least four, where all would move too much."""
    sizes = run.sizes
    if run.config.train.participation == 1 and isinstance(run.config.lora.rank, int):
        sizes = dict(itertools.islice(sizes.items(), ALIKE))
    cohort = cohort_size(len(sizes), run.config.train.participation)
    affordable = DRY_BYTES // (cohort * start.num_bytes())
    rules, weights = compose(run.config.aggregate.rules), run.config.aggregate.weights
    federation = Federation(
        method=method,
        engine=Untrained(sizes, run.config.wire.up),
        aggregation=Aggregation(rules, weights, exactness=False),
        ranks=run.config.lora.ranks,
        seed=run.config.seed,
        rounds=max(4, min(run.config.train.rounds, affordable)),
        lr=lambda round: 0.0,
        participation=run.config.train.participation,
    )
    return dry_run(federation, start)


def _checkpoints(run: Estimate, state: RunState) -> int:
    """Bytes of the checkpoints that are kept, and of the adapter at the end."""
    adapter = state.server.adapter
    if run.config.data.validation is not None:
        state = replace(state, best=Best(1, 0.0, adapter))
    each = sum(tensor.nbytes for tensor in contents(state).values())
    return KEPT_CHECKPOINTS * each + to_peft(adapter).num_bytes()


def _personal(run: Estimate, method: Method, start: AdapterState) -> int:
    """Bytes that clients keep on disk: personal tensors and the residuals of encoded uploads."""
    personal = start.only(method.personal_roles).num_bytes()
    if run.config.wire.up != "fp32" and method.federated:
        personal += start.only(method.shared(1) | method.shared(2)).num_bytes()
    return len(run.sizes) * KEPT_STATES * personal


def _with_method(config: RunConfig, name: str) -> RunConfig:
    if name == config.method.name:
        return config
    return config.model_copy(update={"method": MethodConfig(name=name)})
