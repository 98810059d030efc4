"""Flower's SuperExec, which starts the app of each run: ``python -m rolora.sites.superexec``.

It takes the arguments of ``flower-superexec``.
"""

from __future__ import annotations

from rolora.sites.flower_internals import superexec
from rolora.sites.logs import escape_records

if __name__ == "__main__":
    escape_records()
    superexec()
