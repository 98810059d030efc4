"""Flower's private names are imported in one file, and each is what that file takes it for.

A failure here names what is gone from the installed flwr; sites/flower_internals.py must follow.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import rolora

SOURCE = Path(rolora.__file__).parent
INTERNALS = SOURCE / "sites" / "flower_internals.py"
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Each (module, name) that a file imports from flwr, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "flwr":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert not [name for name in names if name.partition(".")[0] == "flwr"], file


PRIVATE = sorted({(m, n) for m, n in imports(INTERNALS) if m not in PUBLIC})
HOMES = {name: module for module, name in PRIVATE}


def flower(dotted: str) -> Any:
    """A private name, such as "Node" or "FleetHttpClient.PullObject"; fails with its name."""
    name, *attributes = dotted.split(".")
    try:
        found = getattr(importlib.import_module(HOMES[name]), name)
        return reduce(getattr, attributes, found)
    except (ImportError, AttributeError):
        pytest.fail(f"flwr {version('flwr')} has no {dotted} in {HOMES[name]}")


def test_private_modules_are_imported_in_one_file() -> None:
    for file in sorted(SOURCE.rglob("*.py")):
        if file != INTERNALS:
            private = {(m, n) for m, n in imports(file) if m not in PUBLIC}
            assert not private, f"{file.relative_to(SOURCE)} imports {private}"


def test_the_public_modules_export_what_is_imported_from_them() -> None:
    used = {pair for file in SOURCE.rglob("*.py") for pair in imports(file)}
    for module, name in sorted(used - set(PRIVATE)):
        exported = importlib.import_module(module).__all__
        assert name in exported, f"flwr {version('flwr')} does not export {name} in {module}"


@pytest.mark.parametrize("name", sorted(HOMES))
def test_a_private_name_exists(name: str) -> None:
    flower(name)


# how each is called: the number of positional arguments, then keywords
CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "FleetHttpClient.from_server_address": (
        1,
        ("insecure", "root_certificates", "interceptors"),
    ),
    "RuntimeVersionHttpInterceptor": (0, ("component_name",)),
    "NodeAuthHttpInterceptor": (2, ()),
    "HeartbeatSender": (1, ()),
    "HeartbeatSender.start": (1, ()),
    "HeartbeatSender.stop": (1, ()),
    **dict.fromkeys(
        [
            "FleetHttpClient.RegisterNode",
            "FleetHttpClient.ActivateNode",
            "FleetHttpClient.DeactivateNode",
            "FleetHttpClient.SendNodeHeartbeat",
            "FleetHttpClient.PullMessages",
            "FleetHttpClient.PullObject",
            "FleetHttpClient.ConfirmMessageReceived",
            "FleetHttpClient.PushMessages",
            "FleetHttpClient.PushObject",
        ],
        (2, ()),
    ),
    "FleetHttpClient.__exit__": (4, ()),
    "pull_and_inflate_object_from_tree": (3, ("return_type",)),
    "make_pull_object_fn_protobuf": (3, ()),
    "make_confirm_message_received_fn_protobuf": (3, ()),
    "make_push_object_fn_protobuf": (4, ()),
    "push_objects": (2, ("object_ids_to_push",)),
    "get_all_nested_objects": (1, ()),
    "get_object_tree": (1, ()),
    "message_to_proto": (1, ()),
    "message_from_proto": (1, ()),
    "remove_content_from_message": (1, ()),
    "create_app": (2, ()),
    "_parse_superlink_lifespan_config": (0, ()),
    "now": (0, ()),
    "verify_signature": (3, ()),
    "bytes_to_public_key": (1, ()),
    "flower_superexec": (0, ()),
    "SubprocessExecutor.launch": (2, ()),
    "LaunchResult.accepted": (0, ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_private_function_takes_the_arguments_that_it_is_given(name: str) -> None:
    positional, keywords = CALLS[name]
    signature = inspect.signature(flower(name))
    try:
        signature.bind(*range(positional), **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(f"{name}{signature} of flwr {version('flwr')} is called otherwise: {error}")


FIELDS = {
    "ActivateNodeRequest": {"public_key", "heartbeat_interval"},
    "DeactivateNodeRequest": {"node_id"},
    "RegisterNodeFleetRequest": {"public_key"},
    "SendNodeHeartbeatRequest": {"node", "heartbeat_interval"},
    "Node": {"node_id"},
    "PullMessagesRequest": {"node"},
    "PushMessagesRequest": {
        "node",
        "messages_list",
        "message_object_trees",
        "clientapp_runtime_list",
    },
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_protobuf_message_has_the_fields_that_are_set(name: str) -> None:
    gone = FIELDS[name] - set(flower(name).DESCRIPTOR.fields_by_name)
    assert not gone, f"{name} of flwr {version('flwr')} has no field {gone}"
