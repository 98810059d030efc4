"""What a run needs, before anything is downloaded or trained: memory, traffic, work and disk.

There is no table of methods: a method's tensors come from its ``init``, its traffic from a dry run
of its rounds, and the cost of a step from running it on shapes alone.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from rolora.algorithm.adapter import AdapterState, Roles, layer_of, role_of
from rolora.algorithm.factors import to_peft, zero_deltas
from rolora.algorithm.ledger import gradient_bytes
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.reduce import compose
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation
from rolora.config.schema import MethodConfig, TrainConfig
from rolora.plan.dry_run import Untrained
from rolora.plan.estimate import Estimate, estimate_run
from rolora.run.experiment import Experiment
from rolora.run.folder import KEPT_CHECKPOINTS, contents
from rolora.run.refusals import require_turns
from rolora.training.client_store import KEPT_STATES
from rolora.training.engine import group_size
from rolora.training.memory import PROCESS, bank_size, free_bytes
from rolora.training.rounds import Best, Federation, RunState, cohort_size, federate

DRY_BYTES = 1 << 30  # the most that a dry run moves, unless four rounds move more
ALIKE = 4  # clients that stand for all where all do the same


@dataclass(frozen=True)
class RoundPlan:
    """One of the two kinds of rounds in the steady state. All in bytes except ``flops``.

    ``factors``: what is trained, with ``trained`` parameters. ``up`` and ``down``: per client and
    round. ``flops``: one client's step. ``activations``: what a bank keeps for the backward pass.
    ``optimizer``: the optimiser's state. ``peak``: the most that training takes, with weights,
    adapters, optimiser and a step. ``worker``: the most that each of several processes takes for
    itself, without weights that are mapped from a file. None if the model cannot run on shapes
    alone.
    """

    factors: str
    trained: int
    up: float
    down: float
    flops: float | None
    activations: int | None
    optimizer: int
    peak: int | None
    worker: int | None


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
    ``workers``: processes that train, or "auto".
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
    workers: int | str
    methods: tuple[MethodPlan, ...]
    notes: tuple[str, ...]


def make_plan(run: Experiment, methods: Sequence[str] = ()) -> Plan:
    """The plan of a run, for each of ``methods`` (default: the configured one).

    Needs the model's configuration only; rows are counted if they are on this machine. Raises
    ConfigError or DataError as a run would.
    """
    found = estimate_run(run)
    planned = [_method_plan(found)] if not methods else []
    for name in methods:
        config, base, labels = run.config, found.experiment.base, found.experiment.labels
        if name != config.method.name:
            config = config.model_copy(update={"method": MethodConfig(name=name)})
        planned.append(
            _method_plan(replace(found, experiment=Experiment(config, base=base, labels=labels)))
        )
    notes = found.notes
    if any(plan.peak is None for method in planned for plan in method.rounds):
        notes += ("this model cannot be run on shapes alone: activations and work are unknown",)
    return Plan(
        model=run.config.model.path,
        source=found.outline.source,
        parameters=sum(p.numel() for p in found.experiment.base.model.parameters()),
        dtype=found.dtype,
        weights=found.weights,
        stored=found.outline.stored_bytes,
        clients=len(found.sizes),
        cohort=found.cohort,
        rows=None if found.rows is None else sum(found.sizes.values()),
        rounds=run.config.train.rounds,
        steps=found.steps,
        tokens=found.tokens,
        cache=found.cache,
        workers=run.config.train.workers,
        methods=tuple(planned),
        notes=notes,
    )


def _method_plan(run: Estimate) -> MethodPlan:
    method, train = run.experiment.method, run.experiment.config.train
    if run.rows is not None:
        require_turns(method, train, run.sizes)
    start = _start(run, method)
    parameters: Counter[str] = Counter()
    for name, tensor in start.items():
        parameters[role_of(name)] += tensor.numel()
    kinds = [[method.trainable(round, local) for local in (0, 1)] for round in (3, 4)]
    bank = _bank(run, start, kinds[0] + kinds[1]) if method.federated else 1
    up, down, state = _dry_run(run, method, start)
    rounds = tuple(
        _round_plan(run, start, kind, bank, fmean(up[first::2]), fmean(down[first::2]))
        for first, kind in enumerate(kinds, start=2)
    )
    flops = [plan.flops for plan in rounds if plan.flops is not None]
    known = run.steps is not None and len(flops) == len(rounds)
    steps = train.rounds * run.cohort * (run.steps or 0)
    return MethodPlan(
        name=method.name,
        parameters=dict(parameters),
        bank=bank,
        adapters=bank * start.num_bytes(),
        rounds=rounds[:1] if kinds[0] == kinds[1] else rounds,
        first_down=down[0],
        up=_total(up, train.rounds, run.cohort) + gradient_bytes(method, start) * len(run.sizes),
        down=_total(down, train.rounds, run.cohort),
        counted=len(up) >= train.rounds,
        flops=steps * fmean(flops) if known else None,
        checkpoints=_checkpoints(run, state),
        personal=_personal(run, method, start),
    )


def _start(run: Estimate, method: Method) -> AdapterState:
    """What clients start from; a gradient, if needed, is made up, since only shapes matter."""
    specs = run.experiment.base.specs
    if method.needs_gradient:
        gradient = {layer_of(name): zero + 1 for name, zero in zero_deltas(specs).items()}
        specs = replace(specs, gradient=gradient)
    return method.init(specs, generator(run.experiment.config.seed, "init"))


def _total(each: Sequence[float], rounds: int, cohort: int) -> int:
    """Bytes of a cohort in all rounds; rounds not in ``each`` are like those from the third on."""
    later = max(rounds - len(each), 0)
    return round(cohort * (sum(each[:rounds]) + later * fmean(each[2:])))


def _bank(run: Estimate, start: AdapterState, trained: Sequence[Roles]) -> int:
    """Clients that train at once, as a run on this machine would choose."""
    device, train = run.experiment.config.device, run.experiment.config.train
    if train.engine == "debug":
        return 1
    cards = torch.cuda.device_count() if run.experiment.config.model.device_map == "auto" else 1
    here = device != "cuda" or torch.cuda.is_available()
    free = cards * free_bytes(device) if here else 1 << 62
    size = bank_size(device, run.tokens, 0, free, run.cohort, train.bank)
    costs = [run.cost(start, roles | run.experiment.settings.kept, size) for roles in trained]
    kept = max((cost.activations // size for cost in costs if cost), default=0)
    return group_size(run.cohort, bank_size(device, run.tokens, kept, free, run.cohort, train.bank))


def _round_plan(
    run: Estimate, start: AdapterState, kind: Sequence[Roles], bank: int, up: float, down: float
) -> RoundPlan:
    """A round whose local steps alternate between the roles in ``kind``."""
    roles: Roles = frozenset().union(*kind)
    trained = sum(tensor.numel() for tensor in start.only(roles).values())
    train = run.experiment.config.train
    gradients = bank * start.only(roles | run.experiment.settings.kept).num_bytes()
    optimizer = _states(train) * gradients
    permanent = run.weights + bank * start.num_bytes()
    # the state is allocated after the first backward pass, when its activations are gone
    during = optimizer if run.steps != 1 or not run.experiment.method.federated else 0
    kept = run.experiment.settings.kept
    costs = [cost for one in kind if (cost := run.cost(start, one | kept, bank)) is not None]
    flops = None
    if costs:  # of a batch that is one of the longest
        tokens = int(run.batch(bank).lengths.sum())
        flops = fmean(cost.flops for cost in costs) * run.tokens / tokens
    alike = abs(run.outline.stored_bytes / run.weights - 1) < 0.1  # stored in the same dtype
    mapped = alike and run.experiment.config.device == "cpu"
    peaks = [permanent + max(during + cost.peak, optimizer + gradients) for cost in costs]
    return RoundPlan(
        factors="+".join(sorted(roles - {"head"})) or "head",
        trained=trained,
        up=up,
        down=down,
        flops=flops,
        activations=max((cost.activations for cost in costs), default=None),
        optimizer=optimizer,
        peak=max(peaks, default=None),
        worker=PROCESS + max(peaks) - (run.weights if mapped else 0) if peaks else None,
    )


def _states(train: TrainConfig) -> int:
    """How many numbers an optimiser remembers of each one that it trains."""
    return {"adamw": 2, "sgd": 1 if train.momentum else 0}[train.optimizer]


def _dry_run(
    run: Estimate, method: Method, start: AdapterState
) -> tuple[list[float], list[float], RunState]:
    """Mean bytes that a client sends and receives in each round, and the state after the last.

    All rounds without training, or only some, at least four, where all would move too much.
    """
    config, sizes = run.experiment.config, run.sizes
    rules, weights = compose(config.aggregate.rules), config.aggregate.weights
    alike = config.train.participation == 1 and isinstance(config.lora.rank, int)
    if alike and not start.only(frozenset({"delta"})):  # a delta grows with the cohort
        sizes = dict(itertools.islice(sizes.items(), max(ALIKE, rules.least)))
    cohort = cohort_size(len(sizes), config.train.participation)
    affordable = DRY_BYTES // (cohort * start.num_bytes())
    trusted = next(iter(sizes)) if config.aggregate.trusted else None  # any one: none trains
    federation = Federation(
        method=method,
        engine=Untrained(sizes, config.wire.up),
        aggregation=Aggregation(rules, weights, exactness=False, trusted=trusted),
        ranks=config.lora.ranks,
        seed=config.seed,
        rounds=max(4, min(config.train.rounds, affordable)),
        lr=lambda round: 0.0,
        participation=config.train.participation,
    )
    up, down, state = list[float](), list[float](), RunState(ServerState(start))
    for result in federate(federation, state):
        state = result.state
        if result.round:
            up.append(result.bytes_up / len(result.cohort))
            down.append(result.bytes_down / len(result.cohort))
    return up, down, state


def _checkpoints(run: Estimate, state: RunState) -> int:
    """Bytes of the checkpoints that are kept, and of the adapter at the end."""
    adapter = state.server.adapter
    if run.experiment.config.data.validation is not None:
        state = replace(state, best=Best(1, 0.0, adapter))
    each = sum(tensor.nbytes for tensor in contents(state).values())
    return KEPT_CHECKPOINTS * each + to_peft(adapter).num_bytes()


def _personal(run: Estimate, method: Method, start: AdapterState) -> int:
    """Bytes that clients keep on disk: personal tensors, the residuals of encoded uploads, and the
    state of optimisers."""
    train = run.experiment.config.train
    personal = start.only(method.personal_roles).num_bytes()
    if run.experiment.config.wire.up != "fp32" and method.federated:
        personal += start.only(method.shared(1) | method.shared(2)).num_bytes()
    personal += _states(train) * start.only(run.experiment.settings.kept).num_bytes()
    return len(run.sizes) * KEPT_STATES * personal
