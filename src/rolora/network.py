"""Whether a hub answers at all, asked once and quickly: its own client asks for half a minute."""

from __future__ import annotations

import urllib.error
import urllib.request

SECONDS = 5.0


def is_reachable(address: str) -> bool:
    """Whether anything at all comes back from this address, by the proxies of the environment."""
    question = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(question, timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it has nothing there, but it answered
    except OSError:
        return False
