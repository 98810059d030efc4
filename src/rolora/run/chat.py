"""A conversation with a run's base model and with its adapter, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora.algorithm.adapter import AdapterState
from rolora.errors import ConfigError
from rolora.model.base import Base
from rolora.run.evaluation import load_trained
from rolora.tasks.chats import Chat, Template
from rolora.tasks.generation import generate
from rolora.tasks.spans import prompts

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Speakers:
    """The base alone (``BEFORE``) and with the adapter (``AFTER``).

    ``template`` writes a conversation; None: a line is a prompt by itself, as the run was trained,
    with ``separator`` behind it, and earlier ones are not repeated.
    """

    base: Base
    adapters: Mapping[str, AdapterState | None]
    template: Template | None
    separator: str

    def answer(
        self, who: str, said: Sequence[str], most: int, show: Callable[[str], None] | None = None
    ) -> str:
        """The greedy answer, of at most ``most`` tokens, to the last of the texts ``said``.

        They are the user's and this speaker's in turn. ``show`` gets the answer piece by piece.
        ConfigError if the model has no room for so many tokens.
        """
        if self.template is None:
            text = said[-1] + self.separator
        else:
            turns = [
                {"role": "assistant" if place % 2 else "user", "content": content}
                for place, content in enumerate(said)
            ]
            text = self.template.write(Chat(turns, None, (), "the chat"), asking=True)
        ids = prompts(self.base.tokenizer, [text], special=self.template is None)
        with self.base.holding(self.adapters[who]):
            return generate(self.base, ids, most, show=show)[0]


def speakers(path: str | Path, model: str | None, overrides: Sequence[str] = ()) -> Speakers:
    """Both speakers of a finished run, or of its adapter folder.

    The arguments are those of ``evaluate_adapter``, which also says what is raised; ConfigError for
    a model that does not write.
    """
    trained, adapter, _ = load_trained(path, {}, model, overrides)
    if trained.kind.head != "causal_lm":
        raise ConfigError(
            f"{path} was trained for {trained.kind.name}, and its model does not write: measure it "
            "with rolora eval, or use it with rolora predict"
        )
    data: Any = trained.config.data
    tokenizer = trained.base.tokenizer
    plain = data.completion is not None or data.choices is not None or not tokenizer.chat_template
    template = None if plain else Template(tokenizer, data.date)
    return Speakers(trained.base, {BEFORE: None, AFTER: adapter}, template, data.separator or "")
