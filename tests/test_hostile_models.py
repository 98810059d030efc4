"""A model's folder that wants code to run: it never does, whatever reads the folder."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import rolora
from rolora.cli.main import app
from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.model.checkpoint import in_order_of_checkpoint, read_config
from rolora.run import runs


class Opens:
    """Runs code when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


KERNELS = [
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "somebody/anything@main:function"},
    {"attn_implementation": {"": "sdpa", "text_config": "kernels-community/flash-attn"}},
    {"experts_implementation": "somebody/experts"},
    {"text_config": {"attn_implementation": "kernels-community/flash-attn"}},
    {"use_kernels": True},
    {"kernel_config": {"RMSNorm": "somebody/rmsnorm"}},
]


@pytest.fixture
def canary(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a model's own code writes if it runs; whoever is asked says yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "canary"


def with_code(site: Path, folder: Path, canary: Path, model_type: str) -> Path:
    """A copy of the site whose model has code of its own, for each class that can be asked for."""
    shutil.copytree(site.parent, folder)
    model = folder / "model"
    (model / "own.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Own: pass\n")
    names = ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer"]
    auto = dict.fromkeys(names, "own.Own")
    config = json.loads((model / "config.json").read_text())
    text = json.dumps({**config, "model_type": model_type, "auto_map": auto})
    (model / "config.json").write_text(text)
    file = model / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}})
    )
    return folder / site.name


@pytest.mark.parametrize("model_type", ["bert", "own"])
def test_a_model_s_own_code_never_runs(
    site: Path, tmp_path: Path, canary: Path, model_type: str
) -> None:
    config = with_code(site, tmp_path / "hostile", canary, model_type)
    known = model_type == "bert"  # then transformers' own code stands for the model's
    planned = CliRunner().invoke(app, ["plan", str(config), "train.cache="], input="y\n" * 9)
    assert isinstance(planned.exception, ConfigError) != known
    if known:
        runs.start(load_config(config, ["train.cache="]), tmp_path / "run")
    else:
        assert "auto_map" in str(planned.exception)
        with pytest.raises(ConfigError, match="its own code") as caught:
            runs.start(load_config(config, ["train.cache="]), tmp_path / "run")
        assert "\n" not in str(caught.value)
    in_order_of_checkpoint("model", ["a", "b"], root=config.parent, offline=True)
    assert not canary.exists()


def test_weights_that_are_no_safetensors_are_refused_and_not_unpickled(
    site: Path, tmp_path: Path, canary: Path
) -> None:
    shutil.copytree(site.parent, tmp_path / "hostile")
    model = tmp_path / "hostile" / "model"
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    config = load_config(tmp_path / "hostile" / site.name)
    for hostile in (False, True):  # transformers itself would read the first
        if hostile:
            code = f"open({str(canary)!r}, 'w').close()"
            (model / "pytorch_model.bin").write_bytes(pickle.dumps(Opens(code)))
        with pytest.raises(ConfigError, match="safetensors") as caught:
            runs.start(config, tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("asked", KERNELS, ids=str)
def test_a_configuration_that_names_a_kernel_of_a_hub_is_refused_before_its_loader(
    asked: dict[str, object], site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel",
        lambda *_, **__: pytest.fail("the loader of kernels was reached"),
        raising=False,
    )
    shutil.copytree(site.parent, tmp_path / "hostile")
    file = tmp_path / "hostile" / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))
    config = tmp_path / "hostile" / site.name
    for refused in (
        lambda: runs.start(load_config(config), tmp_path / "run"),
        lambda: read_config({"pretrained_model_name_or_path": str(file.parent)}),
    ):
        with pytest.raises(ConfigError, match="asks for code from a hub") as caught:
            refused()
        assert "\n" not in str(caught.value)
    planned = CliRunner().invoke(app, ["plan", str(config)])
    assert isinstance(planned.exception, ConfigError)


def test_every_call_that_could_run_a_model_s_own_code_says_not_to() -> None:
    root = Path(rolora.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("from_pretrained", "from_config")
                and ast.unparse(node.func.value) != "peft.PeftModel"  # is given a loaded model
            ):
                told = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                assert isinstance(told, ast.Constant), f"{file}:{node.lineno}"
                assert told.value is False, f"{file}:{node.lineno}"
