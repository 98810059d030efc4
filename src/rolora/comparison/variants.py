"""The methods of a comparison as they are named: ``rolora``, or ``rolora+first=A`` with options.

>>> variant_overrides("rolora+first=A")
['method.first=A']
>>> addressed("rolora+first=A:train.lr=1e-3", ["rolora", "rolora+first=A"])
('rolora+first=A', 'train.lr=1e-3')
"""

from __future__ import annotations

from collections.abc import Sequence

from rolora.errors import ConfigError, nearest


def method_of(label: str) -> str:
    """The method's name: what stands before the options."""
    return label.partition("+")[0]


def variant_overrides(label: str) -> list[str]:
    """The options as overrides. ConfigError for one that is not of the form NAME=VALUE."""
    options = label.split("+")[1:]
    for option in options:
        if not all(option.partition("=")):
            raise ConfigError(f"method {label!r}: write options as {method_of(label)}+NAME=VALUE")
    return [f"method.{option}" for option in options]


def addressed(text: str, labels: Sequence[str]) -> tuple[str, str]:
    """Whom an override is for (``""``: all), and the override: ``fedit:train.lr=1e-3``.

    ConfigError if it is for a method that is not compared.
    """
    for label in labels:
        if text.startswith(f"{label}:"):
            return label, text.removeprefix(f"{label}:")
    before, colon, _ = text.partition(":")
    if colon and "=" not in before:
        raise ConfigError(f"{text!r} is for {before!r}, not compared: {nearest(before, labels)}")
    return "", text


def listed(text: str) -> list[str]:
    """The labels of a comma-separated list. ConfigError if there is none, or one twice."""
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels:
        raise ConfigError("compare needs at least one method")
    if len(set(labels)) < len(labels):
        again = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(f"method {again!r} is there twice")
    return labels
