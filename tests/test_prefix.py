"""Claims about frozen layers that run once: the same results, and a cache that never misleads."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from states import relative
from tiny_clients import Bench, classifier, language_model
from tiny_site import make_site

from rolora.config.load import load_config
from rolora.model.prefix import Prefix, below_adapters, kept_below, with_prefix
from rolora.run import runs
from rolora.training.local import evaluate
from rolora.training.settings import LocalSettings

pytestmark = pytest.mark.usefixtures("quick")

SETTINGS = LocalSettings(steps=None, epochs=2, batch_size=4)
MAKERS = {"bert": classifier, "llama": language_model, "gpt2": language_model}


def top(name: str, folder: Path) -> Bench:
    return MAKERS[name](getattr(tiny, f"tiny_{name}")(folder / "model"), layers="top:1")


def cached(bench: Bench, folder: Path) -> tuple[Bench, Prefix]:
    prefix = below_adapters(bench.base, bench.examples, folder)
    assert prefix is not None
    return dataclasses.replace(
        bench, examples=with_prefix(bench.base, bench.examples, prefix)
    ), prefix


@pytest.mark.parametrize("name", MAKERS)
def test_clients_on_a_cached_prefix_train_and_score_as_on_the_whole_model(
    name: str, tmp_path: Path
) -> None:
    bench = top(name, tmp_path)
    short, _ = cached(bench, tmp_path / "cache")
    work = bench.work(SETTINGS)
    for one, other in zip(short.train(work, SETTINGS), bench.train(work, SETTINGS), strict=True):
        assert relative(one.adapter, other.adapter) <= 1e-9
        assert one.loss == pytest.approx(other.loss, rel=1e-10)
    scores = [evaluate(b.base, b.task, b.examples, work[0].start) for b in (bench, short)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_the_layers_below_run_once_and_never_again(tmp_path: Path) -> None:
    bench = top("bert", tmp_path)
    calls: list[int] = []
    layers = bench.base.model.get_submodule("bert.encoder.layer")
    layers[0].attention.register_forward_hook(lambda *_: calls.append(0))  # type: ignore[index]
    short, _ = cached(bench, tmp_path / "cache")
    assert calls
    calls.clear()
    again, _ = cached(bench, tmp_path / "cache")
    short.train(bench.work(SETTINGS), SETTINGS)
    again.train(bench.work(SETTINGS), SETTINGS)
    assert not calls


def test_other_weights_other_rows_and_other_threads_find_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = top("bert", tmp_path)
    file = cached(bench, tmp_path)[1].file
    fewer = dataclasses.replace(bench.examples, tokens=bench.examples.tokens.flip(0))
    other_rows = below_adapters(bench.base, fewer, tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.embeddings.word_embeddings.weight"][5] += 1
    save_file(tensors, weights, {"format": "pt"})
    changed = classifier(tmp_path / "model", layers="top:1")
    other_weights = below_adapters(changed.base, changed.examples, tmp_path)
    assert other_rows is not None
    assert other_weights is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    other_threads = below_adapters(changed.base, changed.examples, tmp_path)
    assert other_threads is not None
    files = {file, other_rows.file, other_weights.file, other_threads.file}
    assert len(files) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "other shape", "no safetensors"])
def test_a_damaged_cache_is_made_again(damage: str, tmp_path: Path) -> None:
    bench = top("bert", tmp_path)
    _, prefix = cached(bench, tmp_path / "cache")
    whole = prefix.file.read_bytes()
    if damage == "other shape":
        save_file({"hidden": torch.zeros(2, 3)}, prefix.file)
    else:
        left = {"cut": whole[:-9], "empty": b"", "no safetensors": b"x" * len(whole)}
        prefix.file.write_bytes(left[damage])
    assert prefix.read() is None
    cached(bench, tmp_path / "cache")
    assert prefix.file.read_bytes() == whole


def test_adapters_in_every_layer_leave_nothing_to_keep(tmp_path: Path) -> None:
    bench = classifier(tiny.tiny_bert(tmp_path / "model"))
    assert below_adapters(bench.base, bench.examples, tmp_path) is None


TOP = ["lora.layers=top:1"]


def test_a_run_says_what_it_keeps_and_learns_the_same(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    kept = load_config(site, [*TOP, f"train.cache={tmp_path / 'cache'}"])
    run = runs.start(kept, tmp_path / "kept")
    assert any("the layers below the adapters (1)" in note for note in run.notes)
    plain = runs.start(load_config(site, [*TOP, "train.cache="]), tmp_path / "plain")
    assert not any("layers" in note for note in plain.notes)
    ends = [list(one.rounds())[-1].state.server.adapter for one in (run, plain)]
    assert relative(*ends) <= 1e-4


def test_a_run_too_short_to_gain_keeps_nothing(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    few = [*TOP, "train.rounds=1", "train.local_steps=1", f"train.cache={tmp_path / 'cache'}"]
    runs.start(load_config(site, few), tmp_path / "run")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fault", ["a file stands there", "no room"])
def test_a_cache_folder_that_cannot_be_used_is_named_and_the_run_goes_on(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, cache = make_site(tmp_path), tmp_path / "cache"
    if fault == "no room":

        def full(handle: int, start: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        cache.write_text("")
    run = runs.start(load_config(site, [*TOP, f"train.cache={cache}"]), tmp_path / "run")
    (note,) = [note for note in run.notes if "cannot be used" in note]
    assert str(cache) in note
    assert "\n" not in note
    assert len(list(run.rounds())) == 5
    assert fault != "no room" or not list(cache.iterdir())


@pytest.mark.parametrize(
    "attack", ["another value", "another header", "writable", "replaced", "another shape"]
)
def test_a_cache_that_others_may_have_written_is_made_again(attack: str, tmp_path: Path) -> None:
    bench = top("bert", tmp_path)
    honest, prefix = cached(bench, tmp_path / "cache")
    before = honest.examples.prefix
    assert before is not None
    right = before.clone()
    if attack == "another value":
        content = bytearray(prefix.file.read_bytes())
        content[-1] ^= 1
        prefix.file.write_bytes(content)
    elif attack == "another header":
        save_file({"hidden": right + 1}, prefix.file)
    elif attack == "writable":
        prefix.file.chmod(0o622)
    elif attack == "another shape":  # of the same bytes, so their hash is right
        with safe_open(prefix.file, framework="pt") as stored:
            about = stored.metadata()
        save_file({"hidden": right.view(right.shape[::-1])}, prefix.file, about)
        prefix.file.chmod(0o600)
    else:
        save_file({"hidden": right + 1}, tmp_path / "forged", {"sha256": "0" * 64})
        (tmp_path / "forged").replace(prefix.file)
    assert prefix.read() is None
    again, _ = cached(bench, tmp_path / "cache")
    assert again.examples.prefix is not None
    assert torch.equal(again.examples.prefix, right)
    assert prefix.file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_cache_folder_that_others_may_write_to_is_not_used_and_the_run_says_so(
    mode: int, tmp_path: Path
) -> None:
    bench, folder = top("bert", tmp_path), tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    examples, note = kept_below(bench.base, bench.examples, folder)
    assert examples.prefix is None
    assert note == (
        f"frozen layers run in every step: {folder} cannot be used (others may write to it)"
    )
    assert not list(folder.iterdir())


def test_the_cache_of_another_user_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = top("bert", tmp_path)
    _, prefix = cached(bench, tmp_path / "cache")
    found = prefix.file.stat()
    other = os.stat_result((found.st_mode, *found[1:4], 4242, *found[5:10]))
    monkeypatch.setattr(Path, "stat", lambda self: other)
    assert prefix.read() is None
