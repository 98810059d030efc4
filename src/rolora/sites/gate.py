"""The only way out of a site: every answer is checked against the policy, and logged."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace

from rolora.files import append_line, make_folder
from rolora.flower.message import REASONS, Scalar, SiteMessage
from rolora.flower.versions import PROTOCOL
from rolora.sites.logs import bound
from rolora.sites.policy import Refused, require_labels
from rolora.sites.site_config import SiteConfig
from rolora.tasks.registry import task_kind

ALWAYS = {"site": str, "protocol": int}
# what each answer may hold beside that
MAY_LEAVE: Mapping[str, Mapping[str, type]] = {
    "hello": {"rolora": str, "torch": str, "flwr": str, "num_examples": int, "labels": str},
    "ready": {"base": str, "tokenizer": str, "layout": str, "num_examples": int},
    "train": {
        "lacks": bool,
        "round": int,
        "num_examples": int,
        "loss": float,
        "steps": float,
        "moved": float,
    },
    "score": {"lacks": bool, "round": int, "metrics": str},
}


def leave(site: SiteConfig, asked: str, run: str | None, reply: SiteMessage) -> SiteMessage:
    """What leaves the site as the answer to the question ``asked`` of this run: never more.

    An answer that the policy does not allow becomes one with a code in its place. Whatever leaves
    is first written to outgoing.log; if that cannot be, only the code "disk" leaves.
    """
    head: dict[str, Scalar] = {"site": site.name, "protocol": PROTOCOL}
    try:
        passed = replace(reply, head={**head, **_passed(site, asked, reply)})
    except Refused as error:
        passed = SiteMessage({**head, "error": error.code}, note=str(error))
    try:
        _log(site, asked, run, passed)
    except OSError as error:
        return SiteMessage({**head, "error": "disk"}, note=f"outgoing.log: {error}")
    return passed


def _passed(site: SiteConfig, asked: str, reply: SiteMessage) -> dict[str, Scalar]:
    """The head of the answer as it may leave. Raises Refused for what may not."""
    if "error" in reply.head:
        code = reply.head["error"]
        if len(reply.head) > 1 or reply.body or code not in REASONS:
            raise Refused("failed", "an error leaves as its code alone")
        return dict(reply.head)
    allowed = {**ALWAYS, **MAY_LEAVE.get(asked, {})}
    for key, value in reply.head.items():
        if key not in allowed or type(value) is not allowed[key]:
            raise Refused("failed", f"{key!r} may not leave as an answer to {asked!r}")
    if reply.body and asked != "train":
        raise Refused("failed", f"no bytes may leave as an answer to {asked!r}")
    head = dict(reply.head)
    if "labels" in head:
        require_labels(site, json.loads(str(head["labels"])))
    if asked == "train" and site.metrics is not None and "loss" not in site.metrics:
        head.pop("loss", None)
    if "metrics" in head:
        found = json.loads(str(head["metrics"])).items()
        head["metrics"] = json.dumps({k: float(v) for k, v in found if k in metrics_of(site)})
    return head


def metrics_of(site: SiteConfig) -> set[str]:
    """The names of the metrics that may leave."""
    if site.metrics is not None:
        return set(site.metrics)
    kinds = [task_kind(task) for task in site.tasks]
    return {name for kind in kinds for name in (*kind.metrics, *kind.answers)}


def _log(site: SiteConfig, asked: str, run: str | None, reply: SiteMessage) -> None:
    """Append to outgoing.log: the question, each value and the tensors that leave, their bytes."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "asked": asked,
        "run": run,
        "left": dict(reply.head),
        "tensors": reply.tensors,
        "bytes": reply.size,
    }
    make_folder(site.folder)
    log = site.folder / "outgoing.log"
    bound(log)
    append_line(log, json.dumps(entry))
