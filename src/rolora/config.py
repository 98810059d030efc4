"""The configuration of a run: one TOML file, dotted overrides, one schema with every default."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator, validate_call

from rolora.errors import ConfigError, nearest
from rolora.method import method_factory
from rolora.schedule import Schedule
from rolora.wire import Format

Share = Annotated[float, Field(gt=0, lt=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2)]


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class ModelConfig(Section):
    """``[model]``: the base model and what it is asked to do."""

    path: str = Field(description="a folder, a hub name, or a file ending in .gguf")
    task: Literal["classification", "causal_lm", "choice"] = Field(
        "classification", description="what is learned"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the frozen base; auto: fp32 on the CPU, bf16 on a GPU"
    )
    head: Literal["train", "freeze"] = Field("train", description="the classifier head")


class LoraConfig(Section):
    """``[lora]``: where and how large the adapters are."""

    rank: int = Field(4, ge=1, description="of lora_A (rank, in) and lora_B (out, rank)")
    alpha: float = Field(8.0, gt=0, description="the product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the inputs of lora_A")
    target_modules: list[str] = Field([], description="left out: PEFT's default")
    layers: str | list[int] = Field("all", description='"all", "top:2", or a list of indices')
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    init_from: str | None = Field(None, description="a PEFT adapter folder to start from")


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

    reducer: Literal["mean", "median", "trimmed_mean"] = Field(
        "mean", description="median and trimmed_mean are coordinate-wise and ignore weights"
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="of trimmed_mean: share cut at each end")
    weights: Literal["num_examples", "uniform"] = Field(
        "num_examples", description="of the clients in a mean"
    )
    clip_norm: float | None = Field(None, gt=0, description="clip each client's move to this norm")
    quorum: int = Field(1, ge=1, description="usable updates that a round needs")


class TrainConfig(Section):
    """``[train]``: rounds and local training."""

    rounds: int = Field(40, ge=1, le=999_999, description="of the server")
    participation: float = Field(1.0, gt=0, le=1, description="share of clients in a round")
    local_steps: int | None = Field(None, ge=1, description="5 if local_epochs is left out too")
    local_epochs: int | None = Field(None, ge=1, description="passes over the client's shard")
    batch_size: int = Field(8, ge=1, description="rows per client and step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="its state is fresh each round")
    lr: float = Field(5e-3, gt=0, description="the learning rate")
    schedule: Schedule = Field("constant", description="of lr across rounds")
    warmup_rounds: int = Field(0, ge=0, description="rounds in which lr rises linearly")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as in AdamW; L2 for sgd")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    max_grad_norm: float | None = Field(None, gt=0, description="clips each client's own gradient")
    bank: Literal["auto"] | int = Field("auto", description="clients trained in one pass")
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
    metric: str | None = Field(None, description="of the best round; left out: the task's own")
    patience: int | None = Field(None, ge=1, description="evaluations without gain before a stop")


class WireConfig(Section):
    """``[wire]``: how what is sent is written."""

    up: Format = Field("fp32", description="from clients; the others: moves with error feedback")


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
        if self.eval.patience is not None and self.data.validation is None:
            raise ValueError("eval.patience needs data.validation (early stop never uses the test)")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply ``key.path=value`` overrides, and check everything.

    The resolved ``config.toml`` of a run folder is read as the run was started: paths from where
    they were. Raises ConfigError, one line, naming the key and the nearest known one.
    """
    values = read_toml(path)
    file = Path(path).expanduser()
    origin = values.pop("provenance", {})
    root = origin.get("root", file.parent) if isinstance(origin, dict) else file.parent
    return make_config({"name": file.stem, **values}, overrides, root=Path(root))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError, one line, if it cannot be read."""
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist (rolora init writes one)") from None
    except IsADirectoryError:
        raise ConfigError(f"config {path} is a folder; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def make_config(
    values: dict[str, Any], overrides: Sequence[str] = (), *, root: Path = Path()
) -> RunConfig:
    """A configuration from nested dicts; see ``load_config``."""
    for override in overrides:
        values = _override(values, override)
    if "root" in values:
        raise ConfigError(f"unknown key 'root': {nearest('root', RunConfig.model_fields)}")
    try:
        config = RunConfig.model_validate({**values, "root": root.resolve()})
    except ValidationError as error:
        raise ConfigError(_first_fault(error)) from None
    _check_method(config.method)
    return config


def dump_config(config: RunConfig, provenance: dict[str, Any]) -> str:
    """The resolved configuration as TOML, with a ``[provenance]`` table (None is left out)."""
    values = config.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps({**values, "provenance": provenance})


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word, as in method.name=ffa_lora
    return _with(values, key.strip().split("."), value)


def _with(values: Any, path: list[str], value: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{path[0]!r} is not inside a table")
    head, *rest = path
    return {**values, head: _with(values.get(head, {}), rest, value) if rest else value}


def _first_fault(error: ValidationError) -> str:
    faults = error.errors()
    # An unknown key usually explains the rest, a required key spelled wrong for example.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where = [str(part) for part in fault["loc"] if not str(part).endswith("]")]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        hint = nearest(where[-1], _keys(where[:-1]))
        return f"unknown key {'.'.join(where)!r}: {hint}{more}"
    if fault["type"] == "missing":
        return f"{'.'.join(where)} is missing{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return ": ".join([*(["[" + ".".join(where) + "]"] if where else []), message]) + more
    return f"{'.'.join(where)}: {message}, got {fault['input']!r}{more}"


def _keys(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for part in path:
        section = section.model_fields[part].annotation
    return [key for key in section.model_fields if key != "root"]


def _check_method(method: MethodConfig) -> None:
    factory = method_factory(method.name)
    try:
        validate_call(factory)(**method.options)
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][-1]) if fault["loc"] else ""
        if fault["type"] == "unexpected_keyword_argument":
            known = factory.__kwdefaults__ or {}
            hint = nearest(key, known) if known else f"method {method.name!r} has no options"
            raise ConfigError(f"unknown key 'method.{key}': {hint}") from None
        raise ConfigError(f"method.{key}: {fault['msg']}, got {fault['input']!r}") from None
