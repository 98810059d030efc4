"""What this machine and this installation are: for run folders and bug reports."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from rolora.training.memory import free_bytes
from rolora.training.processes import usable_cores


def environment() -> dict[str, Any]:
    """Versions, processor, cores, memory (bytes), GPUs, and the git commit ("" outside a checkout).

    ``packages`` has every library that rolora can use; one that is not installed is None.
    """
    return {
        "rolora": version("rolora"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_free": free_bytes("cpu"),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "packages": packages(),
    }


def processor() -> str:
    """The processor's kind and the instructions that torch uses on it, which bits depend on."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def packages() -> dict[str, str | None]:
    """Each library that rolora or one of its extras names -> its version; None: not installed."""
    used = [text for text in requires("rolora") or () if not re.search("extra == .dev", text)]
    named = (re.match(r"[\w.-]+", text) for text in used)
    return {name: _version(name) for name in dict.fromkeys(one[0] for one in named if one)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Names of the devices that torch can use, beside the processor."""
    if torch.backends.mps.is_available():
        return ["mps"]
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards]


def git_commit() -> str:
    """The git commit that rolora runs from, or "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip()
