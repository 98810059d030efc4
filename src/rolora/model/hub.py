"""An adapter folder on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from rolora.errors import ConfigError, RoloraError, one_line
from rolora.network import is_reachable

CONFIG = "adapter_config.json"
KEPT = "rolora.json"  # the run's configuration: paths, and perhaps names of clients


@dataclass(frozen=True)
class Upload:
    """What :func:`upload` does: adds ``files`` to the repository ``name``, as ``account``.

    ``private``: whether the repository is; None if it is not there yet, and will be.
    """

    name: str
    endpoint: str
    account: str
    private: bool | None
    files: Sequence[CommitOperationAdd]

    @property
    def megabytes(self) -> float:
        """The size of all files."""
        return sum(file.upload_info.size for file in self.files) / 1e6


def prepare(folder: Path, name: str) -> Upload:
    """Ask the hub what uploading an adapter folder to ``name``, USER/REPOSITORY, would do.

    The files are the folder's own, without ``rolora.json`` and hidden ones; of a base that is a
    folder or a GGUF file of this machine, only the name is given. The server and the token are
    those of ``huggingface_hub`` (HF_ENDPOINT, HF_TOKEN). ConfigError for a name or token that
    cannot be used; RoloraError if the hub does not answer.
    """
    owner, _, repository = name.partition("/")
    if not owner or not repository or "/" in repository:
        raise ConfigError(f"--push {name}: give USER/REPOSITORY")
    api = HfApi()
    if is_offline_mode() or not is_reachable(api.endpoint):
        raise RoloraError(f"the hub at {api.endpoint} does not answer: nothing was uploaded")
    with _in_one_line(name):
        account = api.whoami()
        if owner not in (account["name"], *(org["name"] for org in account.get("orgs", []))):
            raise ConfigError(
                f"--push {name}: the token is of {account['name']}, who is not a member of "
                f"{owner!r}: nothing was uploaded"
            )
        try:
            private = bool(api.repo_info(name).private)
        except RepositoryNotFoundError:
            private = None
    files = [_file(path) for path in sorted(folder.iterdir()) if _travels(path)]
    return Upload(name, api.endpoint, account["name"], private, files)


def upload(planned: Upload) -> str:
    """Do it, in one commit, and return the repository's address. RoloraError if the hub refuses."""
    api = HfApi(endpoint=planned.endpoint)
    with _in_one_line(planned.name):
        if planned.private is None:
            api.create_repo(planned.name, private=True)
        api.create_commit(planned.name, planned.files, commit_message="Adapter trained with rolora")
    return f"{planned.endpoint}/{planned.name}"


def _travels(path: Path) -> bool:
    return path.is_file() and path.name != KEPT and not path.name.startswith(".")


def _file(path: Path) -> CommitOperationAdd:
    """The file as it is uploaded."""
    if path.name != CONFIG:
        return CommitOperationAdd(path.name, path)
    values = json.loads(path.read_text())
    base = Path(values["base_model_name_or_path"])
    if base.is_absolute():
        file = Path(json.loads(path.with_name(KEPT).read_text())["config"]["model"]["path"])
        values["base_model_name_or_path"] = (file if file.suffix == ".gguf" else base).name
    return CommitOperationAdd(path.name, json.dumps(values, indent=2).encode())


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Errors of the hub's client, which come from several libraries, as ours."""
    try:
        yield
    except RoloraError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"--push {name}: {one_line(error)}") from None
    except LocalTokenNotFoundError:
        raise ConfigError(
            "the hub's token is missing: run hf auth login, or set HF_TOKEN"
        ) from None
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"the hub refuses the token for {name}: make one with write access, and run hf "
                "auth login or set HF_TOKEN"
            ) from error
        raise RoloraError(f"uploading to {name} failed: {one_line(error)}") from error
