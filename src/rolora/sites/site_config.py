"""``site.toml``: what one site contributes to every run, and where the coordinator is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from rolora.config.load import first_fault, read_toml
from rolora.config.schema import Section
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError
from rolora.flower.message import SITE_NAME


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
    columns: list[str] | None = Field(
        None, min_length=1, description="those that a run may read; left out: all in the file"
    )
    model: str | None = Field(
        None, description="the base model here; left out: what the run's configuration says"
    )
    base: str | None = Field(
        None,
        min_length=6,
        description="how the base model's hash must begin, for rolora site --check",
    )
    text: str | list[str] | None = Field(None, description="columns here; left out: the run's")
    label: str | list[str] | None = Field(
        None, description="the label column or columns here; left out: the run's"
    )
    device: Literal["cpu", "cuda", "mps"] = Field("cpu", description="where the model computes")
    threads: int | None = Field(None, ge=1, description="of torch; left out: all cores")
    state: str = Field("rolora-site", description="folder for what the site keeps")
    superlink: str = Field("127.0.0.1:8000", description="the coordinator's address, host:port")
    certificates: str | None = Field(None, description="the CA certificate, PEM; none: no TLS")
    key: str | None = Field(None, description="this site's private key; none: no key is asked for")
    root: Path = Field(Path(), exclude=True)

    @property
    def form(self) -> TextForm:
        """How this site's file is written, if it is text."""
        return TextForm(self.delimiter, self.encoding)

    @property
    def folder(self) -> Path:
        """Where the site keeps its state."""
        return self.root / Path(self.state).expanduser()

    def path(self, value: str | None) -> Path | None:
        """A path from this file, such as ``key``, if it is set."""
        return None if value is None else self.root / Path(value).expanduser()


def read_site(path: str | Path) -> SiteConfig:
    """A site's configuration; its paths are relative to the file. ConfigError, one line."""
    values = read_toml(path, "rolora federation keys writes one")
    try:
        root = Path(path).expanduser().resolve().parent
        return SiteConfig.model_validate({**values, "root": root})
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error, SiteConfig)}") from None
