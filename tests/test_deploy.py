"""The files that operators copy from deploy/ are well formed, and the commands in them exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Group
from tiny_site import make_site
from typer.main import get_command

from rolora.cli import main as cli
from rolora.sites.folder import FederationFolder

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES, SLURM = DEPLOY / "kubernetes.yaml", DEPLOY / "compare.sbatch"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
DOCUMENTS = [one for one in yaml.safe_load_all(KUBERNETES.read_text()) if one]


def containers() -> Iterator[dict[str, Any]]:
    """Every container of every pod."""
    for document in DOCUMENTS:
        pod = document["spec"].get("template", {}).get("spec", {})
        yield from [*pod.get("initContainers", []), *pod.get("containers", [])]


def installed(program: str) -> str:
    """The program beside Python or on the PATH; skips the test without it."""
    path = shutil.which(
        program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.mark.parametrize("file", sorted(DEPLOY.iterdir()), ids=lambda file: file.name)
def test_the_commands_in_a_file_of_deploy_parse(file: Path) -> None:
    text = file.read_text().replace("\\\n", " ")
    found = re.findall(r"(?:^|[/ |])(rolora (?:federation|site|compare|run|report)\b[^|\n]*)", text)
    found += [shlex.join(one["command"]) for one in containers() if file == KUBERNETES]
    parsed = 0
    for line in found:
        words = shlex.split(line, comments=True)
        if words[0] != "rolora":
            continue
        command, rest = get_command(cli.app), words[1:]
        while isinstance(command, Group):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[1], [word.replace("$SLURM_ARRAY_TASK_ID", "0") for word in rest])
        parsed += 1
    assert parsed or file.name == "Containerfile"  # its command is a list


def test_each_pod_is_confined_and_a_site_never_runs_twice() -> None:
    for one in containers():
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    (site,) = (one for one in DOCUMENTS if one["kind"] == "Deployment")
    assert (site["spec"]["replicas"], site["spec"]["strategy"]["type"]) == (1, "Recreate")


def test_only_sites_reach_the_coordinator_and_only_its_first_port() -> None:
    (policy,) = (one for one in DOCUMENTS if one["kind"] == "NetworkPolicy")
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "rolora-site"}}}]


def test_a_release_uses_no_secret_and_grants_each_job_only_what_it_needs() -> None:
    text = WORKFLOW.read_text()
    assert "secrets." not in text
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_the_manifest_has_the_fields_of_its_kinds() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    for document in DOCUMENTS:
        validate.validate(document, "1.30", strict=True)


def test_keys_that_a_stopped_start_did_not_make_are_made_by_the_next(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "rolora"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from rolora.cli.main import main; main()' \"$@\"\n"
    )
    program.chmod(0o755)
    made = FederationFolder.create(tmp_path / "federation", "coordinator", 8000)
    made.add_site("ann")
    before = made.public["ann"].read_bytes()
    (step,) = (one for one in containers() if one["name"] == "keys")
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        subprocess.run(
            [*step["command"], *step["args"]],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            check=True,
            capture_output=True,
        )
    assert list(made.public) == ["ann", "bob"]
    assert made.public["ann"].read_bytes() == before


def test_linters_find_nothing() -> None:
    for command in (
        [installed("shellcheck"), str(SLURM)],
        [installed("yamllint"), "-d", "relaxed", str(KUBERNETES), str(WORKFLOW)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert "error" not in done.stdout


@pytest.mark.slow
def test_two_tasks_of_the_slurm_array_end_in_one_page(tmp_path: Path) -> None:
    make_site(tmp_path)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "rolora"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m rolora "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_CPUS_PER_TASK": "1"}
    short = ("--methods", "rolora,fedit", "train.rounds=2")
    for task in ("0", "1"):
        words = ["bash", str(SLURM), "run.toml", *short]
        own = {**environment, "SLURM_ARRAY_TASK_ID": task}
        subprocess.run(words, cwd=tmp_path, env=own, check=True, capture_output=True)
    report = re.findall(r"^#   (rolora report .*)$", SLURM.read_text(), re.MULTILINE)[0]
    done = subprocess.run(
        ["bash", "-c", report], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    assert b"rolora" in done.stdout
    page = (tmp_path / "runs" / "array" / "report.html").read_text()
    assert "fedit" in page
