"""A site that trains as it should and then lies, in another way each round: run it like one.

The lies are told about train questions only; from the round after the last lie on it is honest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load, save

from rolora.flower.message import SiteMessage
from rolora.sites.node import serve
from rolora.sites.site import Site
from rolora.sites.site_config import read_site

Lie = Callable[[SiteMessage], SiteMessage]
before: dict[str, SiteMessage] = {}  # the last honest answer


def head(**changed: Any) -> Lie:
    """Another value in the head."""
    return lambda reply: replace(reply, head={**reply.head, **changed})


def values(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """Other values under the right names: the payload's float32 numbers, changed."""

    def lie(reply: SiteMessage) -> SiteMessage:
        ((title, packed),) = load(reply.body).items()
        spoilt = spoil(packed.view(torch.float32).clone()).contiguous()
        return replace(reply, body=save({title: spoilt.view(-1).view(torch.uint8)}))

    return lie


def title(text: str) -> Lie:
    """The right number of bytes under another title, which says names, shapes and format."""

    def lie(reply: SiteMessage) -> SiteMessage:
        ((_, packed),) = load(reply.body).items()
        return replace(reply, body=save({text: packed}))

    return lie


def poisoned(numbers: torch.Tensor) -> torch.Tensor:
    numbers[len(numbers) // 2] = torch.nan
    return numbers


# what it does -> what the record says of it, and how it is done
LIES: dict[str, tuple[str, Lie]] = {
    "nan": ("not finite", values(poisoned)),
    "infinity": ("not finite", values(lambda numbers: numbers / 0)),
    "a rank too small": ("the payload has", values(lambda numbers: numbers[: len(numbers) // 2])),
    "a rank too large": ("the payload has", values(lambda numbers: numbers.repeat(2))),
    "oversized": ("the payload has", lambda reply: replace(reply, body=bytes(900_000))),
    "empty": ("the payload has 0 bytes", lambda reply: replace(reply, body=b"")),
    "other names or shapes": ("header is not that", title("fp32-00000000")),
    "half precision": (
        "the payload has",
        values(lambda numbers: numbers.to(torch.bfloat16).view(torch.uint8).clone()),
    ),
    "more rows": ("num_examples is 900", head(num_examples=900)),
    "a negative number of rows": ("expected an integer", head(num_examples=-5)),
    "stale": ("it is for round", lambda reply: before["reply"]),
    "another name": ("calls itself", head(site="ann")),
    "another protocol": ("protocol 99", head(protocol=99)),
    "says that it failed": ("out of luck", lambda reply: SiteMessage({"error": "out of luck"})),
    "says that it lacks tensors, twice": ("could not assemble the adapter", head(lacks=True)),
}

# and what does not pass the SuperLink's gate, so that only its announcement arrives
TOO_LARGE = (
    "no answer before the deadline",
    lambda reply: replace(reply, body=bytes(50_000_000)),
)


def main() -> None:
    """Serve, lying."""
    settings = read_site(sys.argv[sys.argv.index("--config") + 1])
    site = Site(settings)

    def answer(question: SiteMessage) -> SiteMessage:
        reply = site.answer(question)
        if question.head.get("ask") != "train":
            return reply
        lies, round = [*LIES.values(), TOO_LARGE], question.integer("round")
        told = lies[round - 1][1](reply) if round <= len(lies) else reply
        before["reply"] = reply
        return told

    serve(settings, answer, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
