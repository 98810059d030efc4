"""The configuration: defaults in one place, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from rolora.config.load import dump_config, load_config, make_config
from rolora.errors import ConfigError
from rolora.model.checkpoint import locate

LEAST = {"model": {"path": "m"}, "data": {"train": "t.csv"}}


def fault(values: dict[str, object], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config({**LEAST, **values}, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_least_config_is_a_model_and_a_file() -> None:
    config = make_config(LEAST)
    assert config.method.name == "rolora"
    assert config.train.local_steps is None  # with local_epochs left out too, this means 5


@pytest.mark.parametrize("text", [f"seed = {'9' * 5000}", "name = [" * 5000, 'a = "\xff"'])
def test_a_file_that_is_no_toml_is_named_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML") as caught:
        load_config(tmp_path / "run.toml")
    assert "\n" not in str(caught.value)


def test_a_number_of_5000_digits_is_no_value_of_a_key() -> None:
    assert "seed: Unable to parse input string" in fault({}, f"seed={'9' * 5000}")


def test_the_home_of_a_user_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[model]\npath = "~nobody-here/m"\n[data]\ntrain = "t"\n')
    config = load_config(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="~nobody-here/m: this machine has no user of that name"):
        locate(config.model.path, tmp_path, offline=True)


def test_an_override_reaches_any_key_and_takes_toml_values_or_bare_words() -> None:
    config = make_config(
        LEAST,
        ["train.lr=1e-3", "method.name=ffa_lora", 'data.text=["a", "b"]', "offline=true"],
    )
    assert (config.train.lr, config.method.name) == (1e-3, "ffa_lora")
    assert (config.data.text, config.offline) == (["a", "b"], True)


@pytest.mark.parametrize(
    ("values", "overrides", "said"),
    [
        ({}, ["train.rouds=3"], "unknown key 'train.rouds': did you mean 'train.rounds'?"),
        ({"trian": {}}, [], "unknown key 'trian': did you mean 'train'?"),
        ({}, ["lr=0.1"], "unknown key 'lr': did you mean 'train.lr'?"),
        ({}, ["train.rounds=three"], "train.rounds: Input should be a valid integer"),
        ({}, ["train.lr=-1"], "train.lr: Input should be greater than 0"),
        ({}, ["lora.rank=0"], "lora.rank: Input should be greater than or equal to 1; or"),
        ({}, ["lora.rank=[8,0]"], "or Input should be a valid dictionary, got [8, 0]"),
        ({}, ["method=fedit"], "method is a table, not 'fedit': give method.KEY=VALUE"),
        ({}, ["data.test=1.5"], "data.test: a share is above 0 and below 1, not 1.5"),
        ({}, ["train.lr=inf"], "train.lr: Input should be a finite number, got inf"),
        ({}, ["method.name=lora_fair", "method.ridge=nan"], "method.ridge: Input should be a fin"),
        ({}, ["method.name=hetlora", "method.decay=inf"], "method.decay: Input should be a fin"),
        ({}, ["train.lr"], "not of the form key.path=value"),
        ({}, ["name.first=1", "name=x", "name.y=2"], "'y' is not inside a table"),
        ({}, ["method.name=rolara"], "unknown method 'rolara': did you mean 'rolora'?"),
        ({}, ["method.fist=B"], "unknown key 'method.fist': did you mean 'method.first'?"),
        ({}, ["method.first=C"], "method.first: Input should be 'A' or 'B'"),
        ({}, ["method.name=flora", "method.first=B"], "method 'flora' has no options"),
        ({}, ["train.local_steps=1", "train.local_epochs=1"], "not both"),
        ({}, ["partition.scheme=by_field"], "partition.field"),
        ({}, ["eval.patience=2"], "data.validation"),
        (
            {},
            ["model.device_map=auto"],
            "model.device_map = 'auto' needs device = 'cuda', not 'cpu'",
        ),
        ({}, ["name=a/b"], "usable as a folder name"),
        ({}, ["root=/"], "unknown key 'root'"),
        ({"model": {}}, [], "model.path is missing"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    values: dict[str, object], overrides: list[str], said: str
) -> None:
    assert said in fault(values, *overrides)


def test_a_missing_or_broken_file_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_a_dumped_config_reads_back_the_same(tmp_path: Path) -> None:
    config = make_config(LEAST, ["train.local_epochs=2", "data.validation=0.1"], root=tmp_path)
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config, {}, tmp_path))
    assert load_config(file) == config


def test_every_default_of_the_schema_is_accepted_when_written_out() -> None:
    text = make_config(LEAST).model_dump(mode="json", exclude_none=True)
    assert make_config(text) == make_config(LEAST)
