"""Whether a server answers, asked once: the hub's own client tries for half a minute."""

from __future__ import annotations

import httpx

SECONDS = 5.0
HUB = "hub:"  # before a name that is on a hub, of a model or of rows


def is_reachable(url: str) -> bool:
    """Whether a server answers at this URL, with whatever status, within 5 seconds.

    The proxies of the environment are used.
    """
    try:
        httpx.head(url, timeout=SECONDS)
    except httpx.HTTPError:
        return False
    return True
