"""``site.toml``: what one site contributes to every run, and where the coordinator is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from rolora.config.load import first_fault, read_toml
from rolora.config.schema import Section
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError
from rolora.files import from_home
from rolora.flower.message import LABEL_LENGTH, MOST_LABELS, SITE_NAME
from rolora.sites.keys import is_loopback

# What a column can be to a run; the operator says which one is.
ROLES = (
    *("text", "label", "prompt", "completion", "chosen", "rejected"),
    *("messages", "tools", "choices", "answer"),
)
Texts = Annotated[list[str], Field(min_length=1, max_length=2)]


def site_name(name: str) -> str:
    """The name, which is also a file's. ValueError if it is not valid."""
    if not SITE_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a valid site name: use up to 64 letters, digits, '-', '_' and '.', "
            "not beginning with '.'"
        )
    return name


class SiteConfig(Section):
    """``site.toml``: what one site contributes; written and read at the site only."""

    name: Annotated[str, AfterValidator(site_name)] = Field(
        description="the client id, the same in every run"
    )
    data: str = Field(description="this site's rows: csv, jsonl, parquet or a datasets folder")
    delimiter: str | None = Field(None, description="as data.delimiter of a run, for this file")
    encoding: str = Field("utf-8", description="as data.encoding of a run, for this file")
    tasks: list[str] = Field(
        ["classification"], min_length=1, description="the tasks that a run may train for"
    )
    text: str | Texts | None = Field(
        None, description="the column that a run may read as text, or two; left out: none"
    )
    label: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="the column that a run may read as label, whose distinct values the "
        "coordinator then gets, or several of 0 and 1; left out: none",
    )
    prompt: str | Texts | None = Field(None, description="likewise, for data.prompt of a run")
    completion: str | None = Field(None, description="likewise, for data.completion")
    chosen: str | None = Field(None, description="likewise, for data.chosen")
    rejected: str | None = Field(None, description="likewise, for data.rejected")
    messages: str | None = Field(None, description="likewise, for data.messages")
    tools: str | None = Field(None, description="likewise, for data.tools")
    choices: str | None = Field(None, description="likewise, for data.choices")
    answer: str | None = Field(None, description="likewise, for data.answer")
    labels: list[str] | None = Field(
        None, min_length=1, description="the only labels that may leave; left out: any"
    )
    max_labels: int = Field(
        100,
        ge=1,
        le=MOST_LABELS,
        description=f"most labels that may leave, of {LABEL_LENGTH} characters at most",
    )
    metrics: list[str] | None = Field(
        None,
        description="metrics of held-out rows that may leave; with loss, also the training loss; "
        "left out: all of the task, and the training loss",
    )
    min_train_rows: int = Field(10, ge=1, description="fewest rows that a round may train on")
    min_score_rows: int = Field(10, ge=1, description="fewest rows that may be scored")
    max_rounds: int = Field(1000, ge=1, description="most rounds of a run")
    max_steps: int = Field(10_000, ge=1, description="most optimizer steps of a round")
    max_batch: int = Field(1024, ge=1, description="most rows of a step")
    max_rank: int = Field(256, ge=1, description="highest LoRA rank")
    max_runs: int = Field(100, ge=1, description="most runs that are ever answered")
    max_questions: int = Field(5000, ge=1, description="most questions of a run that are answered")
    model: str | None = Field(
        None, description="the base model here; left out: what the run's configuration says"
    )
    base: str | None = Field(
        None,
        min_length=6,
        description="how the base model's hash must begin, for rolora site --check",
    )
    device: Literal["cpu", "cuda", "mps"] = Field("cpu", description="where the model computes")
    threads: int | None = Field(None, ge=1, description="torch threads; left out: all cores")
    state: str = Field("rolora-site", description="folder for what the site keeps")
    superlink: str = Field("127.0.0.1:8000", description="the coordinator's address, host:port")
    certificates: str | None = Field(
        None,
        description="the CA certificate, PEM; none: no TLS, for a SuperLink on this machine",
    )
    key: str | None = Field(None, description="this site's private key; none: no key is asked for")
    root: Path = Field(Path(), exclude=True)

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        host = self.superlink.rpartition(":")[0]
        if self.certificates is None and host and not is_loopback(host):
            raise ValueError(
                f"{self.superlink} is another machine, and without TLS anybody in between could "
                'read and change what travels: set certificates = "ca.crt", which the coordinator '
                "hands out"
            )
        return self

    @property
    def form(self) -> TextForm:
        """How this site's file is written, if it is text."""
        return TextForm(self.delimiter, self.encoding)

    @property
    def roles(self) -> dict[str, list[str]]:
        """Role -> the columns that the operator gave it."""
        named = {role: getattr(self, role) for role in ROLES}
        return {
            role: [columns] if isinstance(columns, str) else columns
            for role, columns in named.items()
            if columns is not None
        }

    @property
    def folder(self) -> Path:
        """Where the site keeps its state."""
        return self.root / from_home(self.state)

    def path(self, value: str | None) -> Path | None:
        """A path from this file, such as ``key``, if it is set."""
        return None if value is None else self.root / from_home(value)


def read_site(path: str | Path) -> SiteConfig:
    """A site's configuration; its paths are relative to the file. ConfigError, one line."""
    values = read_toml(path, "rolora federation keys writes one")
    try:
        root = from_home(path).resolve().parent
        return SiteConfig.model_validate({**values, "root": root})
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error, SiteConfig)}") from None
