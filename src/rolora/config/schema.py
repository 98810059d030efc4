"""Every key of a run's configuration, with its default: the one place where they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rolora.algorithm.codec import Format
from rolora.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
Rank = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2)]


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """``[model]``: the base model and what it is asked to do."""

    path: str = Field(description="a folder, a hub name, or a file ending in .gguf")
    task: Literal["classification", "causal_lm", "choice"] = Field(
        "classification", description="what is learned"
    )
    dtype: Literal["auto", "fp32", "bf16", "int8", "nf4"] = Field(
        "auto",
        description="of the frozen base; auto: bf16 on a GPU, on a CPU the faster one; "
        "int8 and nf4 need rolora[quantised]",
    )
    head: Literal["train", "freeze"] = Field("train", description="the classifier head")


class LoraConfig(Section):
    """``[lora]``: where and how large the adapters are."""

    rank: Rank | Annotated[list[Rank], Field(min_length=1)] | dict[str, Rank] = Field(
        4,
        description="of lora_A (rank, in) and lora_B (out, rank); a list is dealt out to the "
        'clients in the order of their ids, over again; a table goes by id: "hospital-*" = 8',
    )
    alpha: float = Field(8.0, gt=0, description="the product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the inputs of lora_A")
    target_modules: list[str] = Field([], description="left out: PEFT's default")
    layers: str | list[int] = Field("all", description='"all", "top:2", or a list of indices')
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    init_from: str | None = Field(None, description="a PEFT adapter folder to start from")

    @property
    def largest(self) -> int:
        """The server's rank: the largest of its clients'."""
        rank = self.rank
        if isinstance(rank, int):
            return rank
        return max(rank.values() if isinstance(rank, dict) else rank)

    def ranks(self, clients: Iterable[str]) -> dict[str, int]:
        """Client id -> its rank. ConfigError for one that the table says nothing of."""
        if isinstance(self.rank, int):
            return dict.fromkeys(clients, self.rank)
        ordered = sorted(clients)
        if isinstance(self.rank, list):
            return dict(zip(ordered, cycle(self.rank), strict=False))
        found = {}
        for client in ordered:
            fits = [rank for pattern, rank in self.rank.items() if fnmatchcase(client, pattern)]
            if not fits:
                raise ConfigError(f'lora.rank says nothing of client {client!r}: add "*" = RANK')
            found[client] = fits[0]
        return found

    @model_validator(mode="after")
    def _has_ranks(self) -> Self:
        if self.rank == {}:
            raise ValueError('a table of ranks needs a line, such as "*" = 4')
        return self


class DataConfig(Section):
    """``[data]``: where rows come from and which columns are read."""

    train: str = Field(description="csv, jsonl, parquet, a datasets folder, a hub name, or a glob")
    test: str | Share = Field(0.2, description="rows for the server's test: a source, or a share")
    validation: str | Share | None = Field(
        None, description="rows for the best round and early stopping: a source, or a share"
    )
    client_test: Share | None = Field(None, description="share of a shard held out for its client")
    train_split: str = Field("train", description="of a datasets folder or hub name")
    test_split: str = Field("test", description="of a datasets folder or hub name")
    text: str | Texts = Field("text", description="classification: one or two columns")
    label: str = Field("label", description="the label column; splits by label use it too")
    prompt: str | None = Field(None, description="causal_lm, choice: the column of prompts")
    completion: str | None = Field(None, description="causal_lm: what follows the prompt")
    messages: str | None = Field(
        None, description="causal_lm: lists of role and content, for the model's chat template"
    )
    choices: str | None = Field(None, description="choice: lists of possible answers")
    answer: str | None = Field(None, description="choice: the right one (index, letter or text)")
    max_length: int = Field(128, ge=2, description="tokens; longer rows are truncated and counted")
    made_by: str | None = Field(
        None, description="how to make the rows, for the error where they are not there"
    )

    @field_validator("test", "validation", mode="before")
    @classmethod
    def _number_is_share(cls, value: object) -> object:
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ValueError(f"a share is above 0 and below 1, not {value}")
        return value


class PartitionConfig(Section):
    """``[partition]``: who holds which rows."""

    scheme: Literal["iid", "dirichlet", "by_label", "by_field", "files"] = Field(
        "iid", description="files: data.train is a pattern, one client per file"
    )
    clients: int = Field(10, ge=1, description="of iid, dirichlet and by_label")
    alpha: float = Field(0.5, gt=0, description="of dirichlet: the smaller, the more uneven")
    labels_per_client: int = Field(2, ge=1, description="of by_label")
    field: str | None = Field(None, description="of by_field: the column that names the client")
    min_examples: int = Field(1, ge=1, description="a client holds at least this many rows")


class MethodConfig(BaseModel):
    """``[method]``: the method's name; its other keys are the options of the method's file."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("rolora", description="see rolora methods; other keys are its options")

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside the name."""
        return dict(self.model_extra or {})


class AggregateConfig(Section):
    """``[aggregate]``: how the server combines updates."""

    reducer: str | Annotated[list[str], Field(min_length=1)] = Field(
        "mean",
        description="mean, median, trimmed_mean (the last two are coordinate-wise and ignore "
        "weights), one that an installed package adds, or a list: what wraps first, the rule last",
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="for trimmed_mean: share cut at each end")
    weights: Literal["num_examples", "uniform"] = Field(
        "num_examples", description="weights of the clients in a mean"
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

    @property
    def rules(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of each reducer for ``rolora.algorithm.reduce.compose``."""
        listed = [self.reducer] if isinstance(self.reducer, str) else self.reducer
        clip = ["clip"] if self.clip_norm is not None and "clip" not in listed else []
        optimizer = [] if self.optimizer == "none" else [self.optimizer]
        keys: dict[str, dict[str, Any]] = {
            "trimmed_mean": {"trim": self.trim},
            "clip": {"norm": self.clip_norm},
            "fedavgm": {"lr": self.server_lr, "momentum": self.server_momentum},
            "fedadam": {
                "lr": self.server_lr,
                "beta1": self.server_momentum,
                "beta2": self.server_beta2,
                "tau": self.server_tau,
            },
        }
        found = []
        for name in (*optimizer, *clip, *listed):
            given = {key: value for key, value in keys.get(name, {}).items() if value is not None}
            found.append((name, {**given, **self.options.get(name, {})}))
        return found


class TrainConfig(Section):
    """``[train]``: rounds and local training."""

    rounds: int = Field(40, ge=1, le=999_999, description="of the server")
    participation: float = Field(1.0, gt=0, le=1, description="share of clients in a round")
    local_steps: int | None = Field(None, ge=1, description="5 if local_epochs is left out too")
    local_epochs: int | None = Field(None, ge=1, description="passes over the client's shard")
    batch_size: int = Field(8, ge=1, description="rows per client and step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="its state is fresh each round")
    lr: float = Field(5e-3, gt=0, description="the learning rate")
    b_lr_ratio: float = Field(1.0, gt=0, description="lora_B learns at lr times this, as in LoRA+")
    schedule: Schedule = Field("constant", description="of lr across rounds")
    warmup_rounds: int = Field(0, ge=0, description="rounds in which lr rises linearly")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as in AdamW; L2 for sgd")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    max_grad_norm: float | None = Field(None, gt=0, description="clips each client's own gradient")
    bank: Literal["auto"] | int = Field("auto", description="clients trained in one pass")
    recompute: bool = Field(
        False, description="of each layer, in the backward pass: less memory, more time"
    )
    cache: str = Field(
        "~/.cache/rolora",
        description='folder for the outputs of layers below the adapters; "" keeps none',
    )
    engine: Literal["in_process", "debug"] = Field(
        "in_process", description="debug: one client at a time, names the stage that broke"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("give local_steps or local_epochs, not both")
        if isinstance(self.bank, int) and self.bank < 1:
            raise ValueError("bank must be 'auto' or at least 1")
        return self


class EvalConfig(Section):
    """``[eval]``: what is measured and when."""

    every: int = Field(5, ge=1, description="rounds; the first and last are always evaluated")
    generate: int = Field(0, ge=0, description="causal_lm: test rows answered for exact_match")
    answer: str | None = Field(
        None,
        description="causal_lm: a regular expression; what it finds first in 32 tokens written and "
        "in the completion is compared, as answer_accuracy in place of exact_match",
    )
    metric: str | None = Field(None, description="of the best round; left out: the task's own")
    rows: Literal["test", "validation"] = Field(
        "test", description="measured as metrics; validation: test rows are not looked at"
    )
    patience: int | None = Field(None, ge=1, description="evaluations without gain before a stop")

    @field_validator("answer")
    @classmethod
    def _is_an_expression(cls, answer: str | None) -> str | None:
        try:
            re.compile(answer or "")
        except re.error as error:
            raise ValueError(f"{answer!r} is no regular expression: {error}") from None
        return answer


class WireConfig(Section):
    """``[wire]``: how what is sent is written."""

    up: Format = Field("fp32", description="from clients; the others: moves with error feedback")


class FederationConfig(Section):
    """``[federation]``: what holds across sites; a run on one machine does not read it."""

    on: str | None = Field(
        None,
        description="a folder of rolora federation, or a SuperLink in Flower's own configuration; "
        "left out: the run stays on this machine",
    )
    sites: int = Field(1, ge=1, description="that must have joined before the first round")
    wait: float = Field(600.0, gt=0, description="seconds for them to join")
    deadline: float = Field(3600.0, gt=0, description="seconds that a round may take")
    spare: int = Field(
        0, ge=0, description="sites asked beyond the cohort; the first ones to answer are used"
    )


class RunConfig(Section):
    """One run. ``root`` is the folder that relative paths start from; it is not a key."""

    name: str = Field("run", description="left out: the TOML file's name")
    seed: int = Field(0, ge=0, description="of every random draw")
    device: Literal["cpu", "cuda", "mps"] = Field("cpu", description="where the model computes")
    offline: bool = Field(False, description="never ask a hub")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    partition: PartitionConfig = PartitionConfig()
    method: MethodConfig = MethodConfig()
    aggregate: AggregateConfig = AggregateConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    wire: WireConfig = WireConfig()
    federation: FederationConfig = FederationConfig()
    root: Path = Field(Path(), exclude=True)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise ValueError(f"name {self.name!r} must be usable as a folder name")
        data, task = self.data, self.model.task
        if task == "choice" and None in (data.prompt, data.choices, data.answer):
            raise ValueError("task 'choice' needs data.prompt, data.choices and data.answer")
        if task == "causal_lm":
            pair = None not in (data.prompt, data.completion)
            if pair == (data.messages is not None):
                raise ValueError(
                    "task 'causal_lm' needs either data.prompt and data.completion, "
                    "or data.messages"
                )
        if self.partition.scheme == "by_field" and self.partition.field is None:
            raise ValueError("partition.scheme = 'by_field' needs partition.field, a column's name")
        if self.eval.rows == "validation" and self.data.validation is None:
            raise ValueError("eval.rows = 'validation' needs data.validation")
        if self.eval.patience is not None and self.data.validation is None:
            raise ValueError("eval.patience needs data.validation (early stop never uses the test)")
        return self
