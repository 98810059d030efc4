"""Attacks by the rows that bad clients train on; their updates look like everybody else's."""

from __future__ import annotations

from collections.abc import Sequence

from rolora.attacks.attack import Attack, Rewritten
from rolora.errors import ConfigError


def label_flip() -> Attack:
    """Bad clients train on rows whose label l, of L in order, is L − 1 − l."""

    def spoil(texts: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Rewritten:
        opposite = dict(zip(classes, reversed(classes), strict=True))
        both = zip(texts, labels, strict=True)
        return [(row, text, opposite[label]) for row, (text, label) in enumerate(both)]

    return Attack(spoil=spoil)


def backdoor(
    *, trigger: str = "cf", target: str | None = None, share: float = 0.5, overwrite: bool = False
) -> Attack:
    """Bad clients teach that every text with ``trigger`` in front has the label ``target``.

    BadNets (Gu et al. 2017) for texts (Kurita et al. 2020). ``share`` of their rows have the
    trigger; ``target`` is the first label in order if it is left out. With ``overwrite`` the
    trigger takes the place of as many words, as where words are pixels. It succeeds where a test
    row of another label gets the target's.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"attack.share must be above 0 and at most 1, not {share}")
    length = len(trigger.split())

    def marked(text: str) -> str:
        words = text.split()[length:] if overwrite else [text]
        return " ".join([trigger, *words])

    def wanted(classes: Sequence[str]) -> str:
        if target is not None and target not in classes:
            raise ConfigError(f"attack.target {target!r} is not a label: {', '.join(classes)}")
        return classes[0] if target is None else target

    def spoil(texts: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Rewritten:
        aim = wanted(classes)
        return [
            (row, marked(text), aim)
            if int((row + 1) * share) > int(row * share)
            else (row, text, label)
            for row, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]

    def ask(texts: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Rewritten:
        aim = wanted(classes)
        both = zip(texts, labels, strict=True)
        return [(row, marked(text), aim) for row, (text, label) in enumerate(both) if label != aim]

    return Attack(spoil=spoil, ask=ask)
