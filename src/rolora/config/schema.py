"""The schema of a run's configuration: every key with its default, in one place."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rolora.algorithm.choices import REDUCERS, Format
from rolora.attacks import NO_ATTACK
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError, nearest
from rolora.tasks.registry import task_kind

AtLeastOne = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2)]
Ranks = Annotated[list[AtLeastOne], Field(min_length=1)]
Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]
RankTable = Annotated[dict[str, AtLeastOne], Field(min_length=1)]


class Section(
    BaseModel, extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
):
    """A table of the TOML file. Unknown keys are errors; values are frozen."""

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (wanted, *get_args(wanted)):
            raise ValueError(f"{str(value).lower()} does not fit here")
        return value


class ModelConfig(Section):
    """``[model]``: the base model and its task."""

    path: str = Field(
        description="a folder, a file ending in .gguf, or hub:NAME or hub:NAME@REVISION; hub: may "
        "be left out if no folder has the name before the slash"
    )
    task: str = Field(
        "classification",
        description="classification, multi_label, regression, causal_lm, choice, preference, or "
        "the task of an installed package",
    )
    dtype: Literal["auto", "fp32", "bf16", "int8", "nf4"] = Field(
        "auto",
        description="dtype of the frozen base; auto: bf16 on a GPU, the faster of fp32 and bf16 "
        "on a CPU; int8 and nf4 need rolora[quantised]",
    )
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto: for a base that does not fit on one GPU, its layers are spread over all "
        'that are visible; with device = "cuda"',
    )
    head: Literal["train", "freeze"] = Field(
        "train", description="whether the classifier head is trained"
    )


class LoraConfig(Section):
    """``[lora]``: where and how large the adapters are."""

    rank: AtLeastOne | Ranks | RankTable = Field(
        4,
        description="rank of lora_A (rank, in) and lora_B (out, rank); a list is repeated over the "
        'clients in order of their ids; a table maps client ids to ranks: "hospital-*" = 8',
    )
    alpha: float = Field(8.0, gt=0, description="lora_B @ lora_A is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate on the input of lora_A")
    target_modules: str | list[str] = Field(
        [],
        description='names of the layers with an adapter, "all-linear", or a regular expression '
        "for their whole paths; left out: PEFT's default",
    )
    layers: str | list[int] = Field(
        "all", description='layers with an adapter: "all", "top:2", or a list of indices'
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    init_from: str | None = Field(None, description="a PEFT adapter folder to start from")

    @property
    def largest(self) -> int:
        """The server's rank, which is the largest client's."""
        rank = self.rank
        if isinstance(rank, int):
            return rank
        return max(rank.values() if isinstance(rank, dict) else rank)

    def ranks(self, clients: Iterable[str]) -> dict[str, int]:
        """Client id -> its rank. Raises ConfigError for a client that the table does not match."""
        if isinstance(self.rank, int):
            return dict.fromkeys(clients, self.rank)
        ordered = sorted(clients)
        if isinstance(self.rank, list):
            return dict(zip(ordered, cycle(self.rank), strict=False))
        found = {}
        for client in ordered:
            fits = [rank for pattern, rank in self.rank.items() if fnmatchcase(client, pattern)]
            if not fits:
                raise ConfigError(f'lora.rank has no rank for client {client!r}: add "*" = RANK')
            found[client] = fits[0]
        return found


class DataConfig(Section):
    """``[data]``: where rows come from and which columns are used."""

    train: str = Field(
        description="a csv, tsv, json, jsonl or parquet file, also .gz or .zst; a folder or "
        "pattern of them; a datasets folder; hub:NAME, hub:NAME:CONFIG, either with @REVISION"
    )
    test: str | Share = Field(
        0.2, description="test rows, held by the server: a source, or a share of train"
    )
    validation: str | Share | None = Field(
        None,
        description="rows that choose the best round and stop early: a source, or a share of train",
    )
    client_test: Share | None = Field(
        None, description="share of each client's rows held out to test that client"
    )
    train_split: str = Field(
        "train", description="split for training, of a datasets folder or hub name"
    )
    test_split: str = Field("test", description="split for data.test, likewise")
    second_test: str | None = Field(
        None,
        min_length=1,
        description="a second source of test rows, such as another site's: measured whenever "
        "data.test is, as accuracy/second and so on; never used to choose a round",
    )
    second_split: str | None = Field(
        None, description="split for data.second_test, likewise; left out: test"
    )
    second_name: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="suffix of its metrics: x gives accuracy/x; left out: second",
    )
    delimiter: str | None = Field(
        None, description='between the values of a csv; left out: ",", in .tsv a tab'
    )
    encoding: str = Field("utf-8", description='of text files, for example "cp1252"')
    text: str | Texts = Field(
        "text", description="classification, multi_label, regression: one or two text columns"
    )
    label: str | Annotated[list[str], Field(min_length=1)] = Field(
        "label",
        description="the column of labels, also for partitions by label; multi_label: of lists of "
        "labels, or several columns of 0 and 1; regression: of numbers; preference, for kto: of "
        "true or false, whether the completion is wanted",
    )
    prompt: str | Texts | None = Field(
        None,
        description="causal_lm, choice, preference: one or two columns of the prompt; preference: "
        "left out: the common beginning of chosen and rejected",
    )
    separator: str | None = Field(
        None,
        description="between two prompt columns, and between prompt and answer; left out: a line "
        "break, and nothing; multi_label: between the labels in a text",
    )
    completion: str | None = Field(
        None, description="causal_lm: the completion column; preference, for kto: likewise"
    )
    chosen: str | None = Field(
        None, description="preference: the column of preferred completions, texts or chats"
    )
    rejected: str | None = Field(
        None, description="preference: the column of less preferred completions"
    )
    messages: str | None = Field(
        None,
        description="causal_lm: a column of chats, lists of role and content, "
        "written out by the model's chat template",
    )
    tools: str | None = Field(
        None,
        description="with messages: a column of lists of tools (JSON schemas), or of such lists as "
        "JSON text, for the chat template",
    )
    date: datetime.date | None = Field(
        None,
        description="with messages, and for preference: the date for a chat template that writes "
        "one; left out: the day the run starts",
    )
    choices: str | None = Field(None, description="choice: a column of lists of answers")
    answer: str | None = Field(
        None, description="choice: the column of right answers (index, letter or text)"
    )
    positive: str | None = Field(
        None, description="classification: the label whose F1 is measured, as f1"
    )
    max_length: int = Field(128, ge=2, description="tokens per row; longer rows are truncated")
    made_by: str | None = Field(
        None, description="how to get the rows; quoted in the error if they are missing"
    )

    @property
    def form(self) -> TextForm:
        """How this machine's text files are written."""
        return TextForm(self.delimiter, self.encoding)

    @model_validator(mode="after")
    def _has_a_known_form(self) -> Self:
        self.form  # noqa: B018  it checks itself
        return self

    @model_validator(mode="after")
    def _second_keys_have_rows(self) -> Self:
        for key in ("second_split", "second_name"):
            if getattr(self, key) is not None and self.second_test is None:
                raise ValueError(f"data.{key} has no effect without data.second_test: remove it")
        return self

    @field_validator("test", "validation", mode="before")
    @classmethod
    def _number_is_share(cls, value: object) -> object:
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ValueError(f"a share is above 0 and below 1, not {value}")
        return value


class PreferenceConfig(Section):
    """``[preference]``: the loss of the task preference."""

    loss: Literal["dpo", "ipo", "kto"] = Field(
        "dpo",
        description="dpo and ipo: for pairs (data.chosen, data.rejected); kto: for single rows "
        "(data.prompt, data.completion, data.label)",
    )
    beta: float = Field(
        0.1, gt=0, description="the larger, the closer the model stays to what it started from"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="for dpo: the share of pairs that may be the wrong way round"
    )

    @model_validator(mode="after")
    def _smooths_labels_of_pairs(self) -> Self:
        if self.label_smoothing and self.loss != "dpo":
            raise ConfigError(
                f"preference.label_smoothing is for loss 'dpo', not for {self.loss!r}: leave it out"
            )
        return self


class PartitionConfig(Section):
    """``[partition]``: who holds which rows."""

    scheme: Literal["iid", "dirichlet", "by_label", "by_field", "files"] = Field(
        "iid", description="files: data.train is a pattern, one client per file"
    )
    clients: int = Field(10, ge=1, description="number of clients, for iid, dirichlet and by_label")
    alpha: float = Field(0.5, gt=0, description="for dirichlet: the smaller, the more uneven")
    labels_per_client: int = Field(2, ge=1, description="for by_label")
    field: str | None = Field(None, description="for by_field: the column that names the client")
    min_examples: int = Field(1, ge=1, description="fewest rows of a client")


class MethodConfig(BaseModel, extra="allow", frozen=True):
    """``[method]``: the method's name; the other keys are that method's options."""

    name: str = Field("rolora", description="see rolora methods; the other keys are its options")

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


# reducer -> its options that are keys of [aggregate], and the key of each
SHORT = {
    "trimmed_mean": {"trim": "trim"},
    "clip": {"norm": "clip_norm"},
    "fedavgm": {"lr": "server_lr", "momentum": "server_momentum"},
    "fedadam": {
        "lr": "server_lr",
        "beta1": "server_momentum",
        "beta2": "server_beta2",
        "tau": "server_tau",
    },
}


class AggregateConfig(Section):
    """``[aggregate]``: how the server combines updates."""

    reducer: str | Annotated[list[str], Field(min_length=1)] = Field(
        "mean",
        description="mean; fedexp, a mean with an adaptive step length; or a rule that ignores "
        "weights: median, trimmed_mean, krum, multi_krum, bulyan, geometric_median, centered_clip, "
        "fltrust; or one that an installed package adds; or a list: steps before the rule (clip, "
        "clip_product, nnm, bucketing), then the rule",
    )
    trusted: str | None = Field(
        None,
        min_length=1,
        description="the client, or site, that you run yourself on rows that you trust: it is in "
        "every cohort, no round advances without it, and fltrust judges the others by it",
    )
    byzantine: int = Field(
        0,
        ge=0,
        description="clients of a round that may send anything, for all rules that need it; above "
        '0 and without a reducer, the reducer is ["nnm", "trimmed_mean"]',
    )
    trim: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="for trimmed_mean: share cut at each end, where byzantine is 0",
    )
    weights: Literal["num_examples", "uniform"] = Field(
        "num_examples", description="weights of the clients in a mean"
    )
    max_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="largest share of one client in the weight of a round; left out: no limit",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="clip each client's update to this norm"
    )
    optimizer: Literal["none", "fedavgm", "fedadam"] = Field(
        "none", description="server optimizer, applied to the aggregated update"
    )
    server_lr: float | None = Field(
        None, gt=0, description="its learning rate; left out: 1 for fedavgm, 0.01 for fedadam"
    )
    server_momentum: float = Field(
        0.9, ge=0, lt=1, description="momentum of fedavgm, beta_1 of fedadam"
    )
    server_beta2: float = Field(0.99, ge=0, lt=1, description="beta_2 of fedadam")
    server_tau: float = Field(1e-3, gt=0, description="for fedadam: added to the root of v")
    quorum: int = Field(1, ge=1, description="fewest valid updates for a round to count")
    options: dict[str, dict[str, Any]] = Field(
        {}, description="[aggregate.options.NAME]: further options of the reducer of that name"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_rule(cls, values: Any) -> Any:
        """The rule to use where clients are suspected and none was chosen."""
        if isinstance(values, dict) and values.get("byzantine") and "reducer" not in values:
            return {**values, "reducer": ["nnm", "trimmed_mean"]}
        return values

    @property
    def rules(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of each reducer for ``rolora.algorithm.reduce.compose``.

        Raises ConfigError for an unknown name.
        """
        listed = [self.reducer] if isinstance(self.reducer, str) else self.reducer
        clip = ["clip"] if self.clip_norm is not None and "clip" not in listed else []
        optimizer = [] if self.optimizer == "none" else [self.optimizer]
        found = []
        for name in (*optimizer, *clip, *listed):
            values = {option: getattr(self, key) for option, key in SHORT.get(name, {}).items()}
            given = {option: value for option, value in values.items() if value is not None}
            if self.byzantine and "byzantine" in REDUCERS.options(name):
                given["byzantine"] = self.byzantine
            found.append((name, {**given, **self.options.get(name, {})}))
        return found

    @property
    def price(self) -> str:
        """What it costs to withstand ``byzantine`` clients, in one line."""
        names = ", then ".join(name for name, _ in self.rules)
        who = "1 client" if self.byzantine == 1 else f"{self.byzantine} clients"
        return (
            f"{who} of a round may send anything ({names}): the server holds all updates of a "
            "round in memory, none is averaged as it comes, and aggregate.weights are ignored"
        )


class TrainConfig(Section):
    """``[train]``: rounds and local training."""

    rounds: int = Field(40, ge=1, le=999_999, description="number of rounds")
    participation: float = Field(1.0, gt=0, le=1, description="share of the clients in each round")
    local_steps: int | None = Field(
        None, ge=1, description="optimizer steps per client and round; 5 without local_epochs"
    )
    local_epochs: int | None = Field(
        None, ge=1, description="passes over the client's rows per round, instead of local_steps"
    )
    batch_size: int = Field(8, ge=1, description="rows per client and step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="what clients train with")
    keep_moments: bool = Field(
        False,
        description="clients keep their optimizer's state from round to round, and update it for "
        "the factor that is not trained, too; otherwise it is reset each round",
    )
    lr: float = Field(5e-3, gt=0, description="the learning rate")
    b_lr_ratio: float = Field(
        1.0, gt=0, description="lora_B's learning rate is lr times this (LoRA+)"
    )
    head_lr_ratio: float = Field(
        1.0, gt=0, description="the task head's learning rate is lr times this"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate over rounds"
    )
    warmup_rounds: int = Field(0, ge=0, description="rounds of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 for sgd")
    momentum: float = Field(0.0, ge=0, lt=1, description="for sgd")
    max_grad_norm: float | None = Field(None, gt=0, description="clip each client's gradient")
    bank: Literal["auto"] | AtLeastOne = Field("auto", description="clients trained in one pass")
    workers: Literal["auto"] | AtLeastOne = Field(
        1,
        description="processes that train a round's groups of clients at the same time, each with "
        "one thread, or as many as OMP_NUM_THREADS says; auto: as many as the cores and the free "
        "memory allow, on CUDA one for each visible GPU",
    )
    recompute: bool = Field(
        False, description="recompute layers in the backward pass: less memory, more time"
    )
    cache: str = Field(
        "~/.cache/rolora",
        description="cache folder for what the base gives without an adapter: the outputs of the "
        'layers below the adapters and, for preference, of the whole; "": no cache',
    )
    engine: Literal["in_process", "debug"] = Field(
        "in_process", description="debug: one client at a time, names the stage that failed"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ConfigError("[train]: give local_steps or local_epochs, not both")
        if self.engine == "debug" and self.workers not in (1, "auto"):
            raise ConfigError(
                "train.engine = 'debug' trains one client at a time in one process: remove it, or "
                "train.workers"
            )
        return self

    def rate(self, round: int) -> float:
        """The learning rate of a round: linear warm-up, then constant or falling towards 0."""
        warmup = self.warmup_rounds
        if round <= warmup:
            return self.lr * round / (warmup + 1)
        left = 1 - (round - 1 - warmup) / max(1, self.rounds - warmup)
        if self.schedule == "linear":
            return self.lr * left
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * (1 - left))) / 2
        return self.lr


class EvalConfig(Section):
    """``[eval]``: what is evaluated, and when."""

    every: int = Field(
        5,
        ge=1,
        description="rounds between evaluations; round 0 and the last round of each phase are "
        "always evaluated",
    )
    generate: int = Field(
        0, ge=0, description="causal_lm: number of test rows to generate answers for (exact_match)"
    )
    answer: str | None = Field(
        None,
        description="causal_lm: a regular expression; its first match in 32 generated tokens is "
        "compared with that in the completion, as answer_accuracy instead of exact_match",
    )
    samples: int = Field(
        3,
        ge=0,
        le=5,
        description="causal_lm: number of test prompts that the report shows, with the answers "
        "before and after training; 0: the report has no text of yours",
    )
    metric: str | None = Field(
        None, description="chooses the best round; left out: the task's main metric"
    )
    rows: Literal["test", "validation"] = Field(
        "test", description="rows behind metrics; validation: the test rows are not used"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations without improvement"
    )

    @field_validator("answer")
    @classmethod
    def _compiles(cls, answer: str | None) -> str | None:
        try:
            re.compile(answer or "")
        except re.error as error:
            raise ValueError(f"{answer!r} is not a regular expression: {error}") from None
        return answer


class WireConfig(Section):
    """``[wire]``: how updates are encoded."""

    up: Format = Field(
        "fp32", description="encoding of uploads; all but fp32 send changes, with error feedback"
    )


# an override nan is a number to TOML, and an attack to us
class AttackConfig(BaseModel, extra="allow", frozen=True, coerce_numbers_to_str=True):
    """``[attack]``: bad clients, to measure how a run withstands them; on one machine only."""

    name: str = Field(
        NO_ATTACK, description="see docs/robustness.md; the other keys are its options"
    )
    clients: int = Field(
        1, ge=1, description="clients of the run that are bad, drawn at random from the seed"
    )

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name and the number of clients."""
        return dict(self.model_extra or {})


class FederationConfig(Section):
    """``[federation]``: settings for runs across sites; a run on one machine ignores them."""

    on: str | None = Field(
        None,
        description="a folder of rolora federation, or a SuperLink in Flower's configuration; "
        "left out: the run stays on this machine",
    )
    sites: int = Field(1, ge=1, description="sites that must join before the first round")
    wait: float = Field(600.0, gt=0, description="seconds to wait for them")
    join: float = Field(
        120.0,
        gt=0,
        description="seconds for a site to answer when it joins; one that does not is asked again, "
        "after a longer pause each time",
    )
    deadline: float = Field(3600.0, gt=0, description="seconds per round")
    labels: list[str] | None = Field(
        None,
        min_length=1,
        description="the run's labels: a site that has others is refused; left out: those of all "
        "sites",
    )
    max_labels: int = Field(100, ge=1, le=1000, description="most labels that a site may have")
    spare: int = Field(
        0, ge=0, description="sites asked in excess of the cohort; the first answers are used"
    )


class TrackConfig(Section):
    """``[track]``: experiment trackers to log each round to. They change no result."""

    to: Tracker | list[Tracker] = Field(
        [], description="a tracker, or a list of them; left out: none"
    )
    project: str | None = Field(
        None, min_length=1, description="the tracker's project; left out: the run's name"
    )

    @property
    def trackers(self) -> list[Tracker]:
        """The trackers, each once."""
        return list(dict.fromkeys([self.to] if isinstance(self.to, str) else self.to))


class RunConfig(Section):
    """One run. ``root`` is the folder that relative paths start from; it is not a key.

    ``server_seed`` and ``track`` are never part of a dump, so no site, run id or report has them.
    """

    name: str = Field("run", description="left out: the TOML file's name")
    seed: int = Field(0, ge=0, description="random seed for the run")
    server_seed: int | None = Field(
        None,
        ge=0,
        exclude=True,
        description="random seed for what clients must not predict, such as cohorts; never leaves "
        "the coordinator; left out: seed on one machine, drawn at random across sites",
    )
    device: Literal["cpu", "cuda", "mps"] = Field("cpu", description="where the model computes")
    offline: bool = Field(False, description="never ask a hub")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    preference: PreferenceConfig = PreferenceConfig()
    partition: PartitionConfig = PartitionConfig()
    method: MethodConfig = MethodConfig()
    aggregate: AggregateConfig = AggregateConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    wire: WireConfig = WireConfig()
    attack: AttackConfig = AttackConfig()
    federation: FederationConfig = FederationConfig()
    track: TrackConfig = Field(TrackConfig(), exclude=True)
    root: Path = Field(Path(), exclude=True)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        name = self.name
        if not name.isprintable() or not name or set(name) & set("/\\") or name.startswith("."):
            raise ConfigError(f"name {name!r} must be usable as a folder name")
        kind, metric = task_kind(self.model.task), self.eval.metric
        chosen, loss = kind.chosen(dict(self.data)), self.preference.loss
        if kind.compares and (loss == "kto") == ("chosen" in chosen):
            needed = "data.prompt, data.completion and data.label"
            pairs = "data.chosen and data.rejected"
            raise ConfigError(
                f"preference.loss = {loss!r} needs {needed if loss == 'kto' else pairs}: with "
                f"{pairs if loss == 'kto' else needed}, use {'dpo' if loss == 'kto' else 'kto'!r}"
            )
        if metric is not None and metric not in kind.metrics:
            hint = nearest(metric, kind.metrics)
            raise ConfigError(f"eval.metric {metric!r} is not measured by {kind.name}: {hint}")
        if metric == "f1" and self.data.positive is None:
            raise ConfigError("eval.metric = 'f1' needs data.positive, the label to measure")
        if self.partition.scheme == "by_field" and self.partition.field is None:
            raise ConfigError(
                "partition.scheme = 'by_field' needs partition.field, the name of a column"
            )
        if self.model.device_map == "auto" and self.device != "cuda":
            raise ConfigError(
                f"model.device_map = 'auto' needs device = 'cuda', not {self.device!r}: it is for "
                "bases that do not fit on one GPU"
            )
        if self.attack.name != NO_ATTACK and self.federation.on is not None:
            raise ConfigError("[attack] is for runs on one machine: remove it, or federation.on")
        if self.train.workers != 1 and self.federation.on is not None:
            raise ConfigError(
                "train.workers is for runs on one machine: remove it, or federation.on"
            )
        if self.eval.rows == "validation" and self.data.validation is None:
            raise ConfigError("eval.rows = 'validation' needs data.validation")
        if self.eval.patience is not None and self.data.validation is None:
            raise ConfigError(
                "eval.patience needs data.validation (early stopping never uses the test rows)"
            )
        return self
