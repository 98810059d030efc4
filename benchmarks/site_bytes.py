"""What passed through a tap, sorted by what it was for, and added up per site and round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest

from benchmarks.wiretap import Exchange

PURPOSE = {
    "pull-messages": "questions",  # unless it brings none
    "pull-object": "questions",
    "confirm-message-received": "questions",
    "push-messages": "answers",
    "push-object": "answers",
    "send-node-heartbeat": "heartbeats",
}


def sorted_out(passed: Sequence[Exchange]) -> Mapping[str, list[Exchange]]:
    """The exchanges of questions, answers, looks (for a question when there was none), heartbeats.

    Raises KeyError for a path that is none of these.
    """
    kinds = ("questions", "answers", "looks", "heartbeats")
    found: dict[str, list[Exchange]] = {kind: [] for kind in kinds}
    for one in passed:
        what = one.path.rpartition("/")[2]
        empty = what == "pull-messages" and not one.body_down
        found["looks" if empty else PURPOSE[what]].append(one)
    return found


def added_up(passed: Sequence[Exchange], times: int) -> dict[str, Any]:
    """Bytes of a question, an answer, and all, when each was sent so many ``times``.

    "message" is the bodies that go the message's way; "stream" all bytes of its exchanges, both
    ways: requests, HTTP heads, TLS. Raises ValueError if other numbers of messages passed.
    """
    kinds = sorted_out(passed)
    messages = {
        "questions": sum(one.path.endswith("pull-messages") for one in kinds["questions"]),
        "answers": sum(one.path.endswith("push-messages") for one in kinds["answers"]),
    }
    if set(messages.values()) != {times}:
        raise ValueError(f"{messages} passed, expected {times} of each")

    def stream(exchanges: Sequence[Exchange]) -> float:
        return sum(one.stream_up + one.stream_down for one in exchanges) / times

    return {
        "question": {
            "message": sum(len(one.body_down) for one in kinds["questions"]) / times,
            "stream": stream(kinds["questions"]),
        },
        "answer": {
            "message": sum(len(one.body_up) for one in kinds["answers"]) / times,
            "stream": stream(kinds["answers"]),
        },
        "all": stream(passed),
        **{f"{kind}_a_round": len(kinds[kind]) / times for kind in ("looks", "heartbeats")},
        "connections_a_round": sum(one.first for one in passed) / times,
    }


def message_bodies(passed: Sequence[Exchange]) -> Mapping[str, list[int]]:
    """Bytes of the bodies of rolora's messages, "down" and "up"."""
    found: dict[str, list[int]] = {"down": [], "up": []}
    for one in passed:
        if one.path.endswith("pull-object"):
            way, content = "down", PullObjectResponse.FromString(one.body_down).object_content
        elif one.path.endswith("push-object"):
            way, content = "up", PushObjectRequest.FromString(one.body_up).object_content
        else:
            continue
        if content.startswith(b"ConfigRecord"):
            body = ConfigRecord.inflate(content)["body"]
            found[way].append(len(body) if isinstance(body, bytes) else 0)
    return found
