"""The federation that a configuration describes, on any engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.method import Method
from rolora.algorithm.step import Aggregation
from rolora.config.schema import EvalConfig, RunConfig
from rolora.data.examples import Examples
from rolora.errors import ConfigError
from rolora.model.base import Base
from rolora.run.configured import make_reducer
from rolora.tasks.generation import answer_accuracy, answered, exact_match
from rolora.tasks.registry import Task
from rolora.training.engine import Engine, Evaluation
from rolora.training.local import evaluate
from rolora.training.rounds import Federation, Metrics
from rolora.training.schedule import learning_rate

ANSWER_TOKENS = 32  # as LLM-Adapters lets a model write before it looks for an answer


def federation_of(
    config: RunConfig,
    method: Method,
    engine: Engine,
    evaluate: Callable[[AdapterState], Evaluation],
    task: Task,
    *,
    per_client: bool,
    spare: int = 0,
) -> Federation:
    """The run that a configuration describes, on this engine; see ``evaluation``."""
    return Federation(
        method=method,
        engine=engine,
        aggregation=Aggregation(
            make_reducer(config), config.aggregate.weights, config.aggregate.quorum
        ),
        ranks=config.lora.ranks,
        seed=config.seed,
        rounds=config.train.rounds,
        lr=_schedule(config),
        participation=config.train.participation,
        metric=_metric(config, task),
        evaluate=evaluate,
        per_client=per_client,
        eval_every=config.eval.every,
        patience=config.eval.patience,
        spare=spare,
    )


def evaluation(
    how: EvalConfig,
    score: Callable[[Examples, EvalConfig, AdapterState], Metrics],
    test: Examples,
    validation: Examples | None,
) -> Callable[[AdapterState], Evaluation]:
    """A function that measures an adapter with ``score`` on the test and the validation rows.

    With ``rows = "validation"`` the test rows are the validation rows, which are measured once.
    """
    unanswered = how.model_copy(update={"generate": 0})

    def evaluate(adapter: AdapterState) -> Evaluation:
        metrics = score(test, how, adapter)
        if how.rows == "validation":
            return Evaluation(metrics, metrics)
        return Evaluation(metrics, score(validation, unanswered, adapter) if validation else {})

    return evaluate


def score(
    base: Base, task: Task, examples: Examples, how: EvalConfig, adapter: AdapterState
) -> Metrics:
    """The task's metrics of an adapter; with ``how.generate``, those of that many answers too."""
    metrics = evaluate(base, task, examples, adapter)
    if how.generate and task.name == "causal_lm":
        rows = range(len(examples))[: how.generate]
        with base.holding(adapter):
            if how.answer is None:
                metrics["exact_match"] = exact_match(answered(base, examples, rows))
            else:
                answers = answered(base, examples, rows, ANSWER_TOKENS)
                metrics["answer_accuracy"] = answer_accuracy(answers, how.answer)
    return metrics


def _schedule(config: RunConfig) -> Callable[[int], float]:
    train = config.train
    return partial(
        learning_rate,
        lr=train.lr,
        rounds=train.rounds,
        schedule=train.schedule,
        warmup_rounds=train.warmup_rounds,
    )


def _metric(config: RunConfig, task: Task) -> str:
    metric = config.eval.metric or task.metrics[0]
    if metric not in task.metrics:
        known = ", ".join(task.metrics)
        raise ConfigError(f"eval.metric {metric!r} is none of what {task.name} measures: {known}")
    return metric
