"""Whether the model hub answers at all. Asked once and quickly: its own client asks for minutes."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

SECONDS = 5.0


def hub_answers() -> bool:
    """Whether a hub can be asked: there is a network, and nobody has told its client to be offline.

    ``HF_ENDPOINT`` names another hub than huggingface.co; proxies are those of the environment.
    """
    if {os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} & {
        "1",
        "ON",
        "YES",
        "TRUE",
    }:
        return False
    place = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
