"""A name on a hub is never taken for a path, nor a path for a name on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from rolora.data.tables import read_table
from rolora.errors import ConfigError, DataError, NotHere
from rolora.model.base import load_base
from rolora.model.checkpoint import locate
from rolora.model.peft import LoraSettings


def test_an_absent_folder_beside_others_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=r"'models/x' does not exist .*write hub:models/x$"):
        locate("models/x", tmp_path, offline=True)
    with pytest.raises(NotHere, match=r"models/x: no such file or .*write hub:models/x$"):
        read_table("models/x", root=tmp_path, offline=True)


def test_a_model_of_the_hub_is_told_with_its_revision(tmp_path: Path) -> None:
    place = locate("hub:owner/name@abc", tmp_path, offline=True)
    name = {"pretrained_model_name_or_path": "owner/name", "local_files_only": True}
    assert place == {**name, "revision": "abc"}
    assert locate("hub:owner/name", tmp_path, offline=True) == name
    assert locate("owner/name", tmp_path, offline=True) == name
    (tmp_path / "owner").mkdir()
    assert locate("hub:owner/name", tmp_path, offline=True) == name
    with pytest.raises(ConfigError, match="run hf download owner/name --revision abc "):
        load_base(
            "hub:owner/name@abc", "classification", LoraSettings(), root=tmp_path, offline=True
        )


def test_rows_of_the_hub_are_told_with_their_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub:owner/name:part@abc", "hub:owner/name", "owner/name:part"):
        assert read_table(source, root=tmp_path, offline=True).num_rows == 1
    assert asked == [
        ("owner/name", "part", "train", "abc"),
        ("owner/name", None, "train", None),
        ("owner/name", "part", "train", None),
    ]


def test_a_folder_where_the_command_runs_is_never_taken_for_the_hub_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "owner").mkdir(parents=True)
    tiny.tiny_bert(tmp_path / "here" / "owner" / "name")
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for source in ("hub:owner/name", "owner/name"):
        with pytest.raises(ConfigError, match="has the same name"):
            locate(source, tmp_path / "root", offline=True)
        with pytest.raises(DataError, match="has the same name"):
            read_table(source, root=tmp_path / "root", offline=True)
