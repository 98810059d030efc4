"""``rolora chat``: chat with a run's model as it was before training and as it is after."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from rolora.cli.options import Changes
from rolora.cli.printing import note, working
from rolora.errors import ConfigError, DataError, printable


def chat(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run folder or an adapter folder")
    ],
    overrides: Changes = None,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="one prompt, which may have several lines, to answer; -: read standard input"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="maximum tokens in an answer")] = 128,
    json: Annotated[bool, typer.Option("--json", help="print each turn as a JSON line")] = False,
) -> None:
    """Chat with a finished run's model: the answer before training, then the answer after it.

    Without --prompt, lines are read from standard input until its end (Ctrl-D). With a chat
    template, each of the two models sees its own conversation. If the run was trained on prompts
    and completions, or its tokenizer has no template, each line is a separate prompt.
    """
    asked = None if prompt is None else _read(prompt)
    if asked is not None and not asked.strip():
        raise ConfigError("--prompt is empty")
    from rolora.run.chat import speakers

    with working("loading the model"):
        both = speakers(path, model, overrides or [])
    if both.template is None and asked is None:
        note("each line is a separate prompt, as in training")
    said: dict[str, list[str]] = {who: [] for who in both.adapters}
    for line in _lines() if asked is None else [asked]:
        if not json and not (asked is None and sys.stdin.isatty()):
            print(printable(f"\nyou     {line}", keep="\n\t"))
        for who, texts in said.items():
            texts.append(line)
            if not json:
                print(f"{who:8}", end="", flush=True)
            texts.append(both.answer(who, texts, max_new_tokens, None if json else _show))
            if not json:
                print()
        if json:
            answers = {who: texts[-1] for who, texts in said.items()}
            print(dumps({"prompt": line, **answers}, ensure_ascii=False), flush=True)


def _lines() -> Iterator[str]:
    """The lines that are typed or piped in; blank ones are skipped."""
    asking = "\nyou     " if sys.stdin.isatty() else ""
    while True:
        try:
            line = _read(None, asking)
        except EOFError:
            return
        if line.strip():
            yield line


def _read(prompt: str | None, asking: str = "") -> str:
    """This prompt; "-": all of standard input; None: its next line. DataError if it is not text."""
    try:
        if prompt == "-":
            text = sys.stdin.read().removesuffix("\n")
        else:
            text = input(asking) if prompt is None else prompt
        text.encode()  # some locales let any byte pass
    except UnicodeError:
        raise DataError("the prompt is not UTF-8 text") from None
    return text


def _show(piece: str) -> None:
    print(printable(piece, keep="\n\t"), end="", flush=True)
