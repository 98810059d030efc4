"""Requests to the SuperLink are repeated while it is away; what it means when it refuses one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from rolora.errors import RoloraError

AWAY = (502, 503, 504)  # a proxy's answers when the SuperLink behind it is down
LONGEST = 10.0  # seconds between two attempts
Answer = TypeVar("Answer")

REFUSALS = {  # what is in the SuperLink's answer -> what the site's operator should know
    '"code":2001': "the SuperLink asks for a key: set this site's in site.toml, as key = ...",
    '"code":2004': "the SuperLink does not know this site's key (have the coordinator register "
    "it), or it was used elsewhere within the last minute",
    "Invalid SuperNode authentication": "the SuperLink cannot verify this site's signature: are "
    "both clocks right to the minute?",
}

_log = logging.getLogger(__name__)


class NotConnected(RoloraError):
    """The SuperLink cannot be reached, or refuses this site; says which, and what to do."""


class Gone(Exception):
    """The run of a message has ended, by the SuperLink."""


def retry(ask: Callable[[], Answer]) -> Answer:
    """The answer, asked for again, at least every 10 s, while the SuperLink cannot be reached.

    Raises Gone if the run has ended, NotConnected if the SuperLink refuses the request.
    """
    wait = 0.5
    while True:
        try:
            return ask()
        except httpx.TransportError as error:
            why: object = error
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == httpx.codes.FORBIDDEN:
                raise Gone("its run has ended") from None
            if status == httpx.codes.UNAUTHORIZED:
                raise NotConnected(
                    "the SuperLink no longer accepts this site's key: ask the coordinator"
                ) from None
            if status not in AWAY:
                raise NotConnected(f"the SuperLink answered: {meaning(error)}") from None
            why = status
        _log.warning("the SuperLink does not answer (%s); next attempt in %.0f s", why, wait)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST)


def meaning(error: httpx.HTTPStatusError) -> str:
    """What a refusal means for the site's operator; the answer itself if that is not known."""
    for part, known in REFUSALS.items():
        if part in error.response.text:
            return known
    return f"{error.response.status_code} {' '.join(error.response.text.split())[:200]}"
