"""How a comparison names its methods: ``rolora``, or ``rolora+first=A`` with options.

>>> variant_overrides("rolora+first=A")
['method.first=A']
>>> addressee("rolora+first=A:train.lr=1e-3", ["rolora", "rolora+first=A"])
('rolora+first=A', 'train.lr=1e-3')
"""

from __future__ import annotations

from collections.abc import Sequence

from rolora.errors import ConfigError, nearest


def method_of(label: str) -> str:
    """The method's name, without the options."""
    return label.partition("+")[0]


def variant_overrides(label: str, section: str = "method") -> list[str]:
    """The options as overrides. ConfigError for one that does not look like NAME=VALUE."""
    options = label.split("+")[1:]
    for option in options:
        if not all(option.partition("=")):
            raise ConfigError(
                f"{section} {label!r}: write options as {method_of(label)}+NAME=VALUE"
            )
    return [f"{section}.{option}" for option in options]


def addressee(text: str, labels: Sequence[str]) -> tuple[str, str]:
    """The method that an override is for (``""``: all), and the override: ``fedit:train.lr=1e-3``.

    ConfigError if that method is not in the comparison.
    """
    for label in labels:
        if text.startswith(f"{label}:"):
            return label, text.removeprefix(f"{label}:")
    before, colon, _ = text.partition(":")
    if colon and "=" not in before:
        hint = nearest(before, labels)
        raise ConfigError(f"{text!r}: {before!r} is not among the compared methods: {hint}")
    return "", text


def checked_labels(labels: Sequence[str]) -> list[str]:
    """The labels, stripped. ConfigError if there is none, or one is repeated."""
    found = [label.strip() for label in labels if label.strip()]
    if not found:
        raise ConfigError("a comparison needs at least one method")
    if again := [label for label in found if found.count(label) > 1]:
        raise ConfigError(f"method {again[0]!r} is listed twice")
    return found
