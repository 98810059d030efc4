"""The party's side of a measurement: a process that gets ready and then does its work on request.

The harness writes one JSON request a line to standard input, ``{"do": "prepare"}``,
``{"do": "run"}`` or ``{"do": "after"}``, and waits for one JSON answer a line. Only "run" is timed,
and from outside.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Answer = Mapping[str, Any]


def serve(
    run: Callable[[], Answer],
    prepare: Callable[[], None] = lambda: None,
    after: Callable[[], Answer] = dict,
) -> None:
    """Say that everything is loaded, then answer requests until standard input ends.

    ``run`` returns ``units`` (how much work was done, which times are divided by) and whatever
    else belongs in the record; ``after`` adds to that what would disturb the clock.
    """
    # libraries print to standard output, so the harness hands over a channel of its own
    with os.fdopen(int(os.environ.get("ANSWERS", "1")), "w", closefd=False) as answers:

        def say(answer: Answer) -> None:
            print(json.dumps(answer), file=answers, flush=True)

        say({"ready": True})
        for line in sys.stdin:
            wanted = json.loads(line)["do"]
            if wanted == "prepare":
                prepare()
            say({"prepare": dict, "run": run, "after": after}[wanted]())
