"""Claims about whole runs on chats: their date is part of them, and every answer is trained on."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from calls import Calls
from test_chats import CHAT, GPT_OSS, PLAIN, QWEN3
from tiny import tiny_llama

from rolora.comparison.grid import plan
from rolora.comparison.queue import queued_runs
from rolora.config.load import load_config, make_config
from rolora.config.schema import RunConfig
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.experiment import Experiment
from rolora.run.settings import dated
from rolora.sites.coordinator import across
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig

pytestmark = pytest.mark.usefixtures("quick")

MONDAY, TUESDAY = datetime.date(2026, 3, 2), datetime.date(2026, 3, 3)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_place(tmp_path, GPT_OSS, PLAIN)
    return tmp_path


def make_place(folder: Path, template: str, chat: Any) -> None:
    tiny_llama(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(template)
    for name in ("site-a", "site-b", "test"):
        (folder / f"{name}.jsonl").write_text((json.dumps({"chat": chat}) + "\n") * 3)


def configuration(place: Path, *overrides: str) -> RunConfig:
    tables: dict[str, Any] = {
        "name": "chats",
        "server_seed": 0,
        "model": {"path": "model", "task": "causal_lm", "dtype": "fp32"},
        "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": "site-*.jsonl", "test": "test.jsonl", "messages": "chat"},
        "partition": {"scheme": "files"},
        "train": {"rounds": 2, "batch_size": 2, "bank": 1, "cache": ""},
        "federation": {"sites": 2, "wait": 5},
    }
    return make_config(tables, ["data.max_length=500", *overrides], root=place)


def today(monkeypatch: pytest.MonkeyPatch, day: datetime.date) -> None:
    """Both clocks: rolora's, and the one that transformers lets templates read."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.combine(day, datetime.time(9))

    class Calendar(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return day

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    monkeypatch.setattr("datetime.date", Calendar)


def test_a_run_goes_on_and_is_measured_tomorrow_on_the_date_that_it_was_started(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today(monkeypatch, MONDAY)
    started = runs.start(configuration(place), tmp_path / "run")
    rounds = started.rounds()
    next(rounds)
    rounds.close()
    today(monkeypatch, TUESDAY)
    *_, last = runs.resume(tmp_path / "run").rounds()
    assert load_config(tmp_path / "run" / "config.toml").data.date == MONDAY
    notes = json.loads((tmp_path / "run" / "adapter" / "rolora.json").read_text())
    assert notes["config"]["data"]["date"] == "2026-03-02"
    rows = str(place / "test.jsonl")
    assert evaluate_adapter(tmp_path / "run", rows) == last.metrics
    other = evaluate_adapter(tmp_path / "run", rows, overrides=["data.date=2031-12-25"])
    assert other != last.metrics


def test_a_comparison_goes_on_tomorrow_on_the_date_that_it_was_started(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today(monkeypatch, MONDAY)
    methods = {"rolora": (), "fedit": ()}
    comparison = plan(configuration(place), methods, [0])
    for queued in queued_runs(comparison, tmp_path / "all"):
        list(queued.run.rounds())
        break
    today(monkeypatch, TUESDAY)
    for queued in queued_runs(comparison, tmp_path / "all"):
        list(queued.run.rounds())
    configs = [load_config(file) for file in (tmp_path / "all").glob("*/config.toml")]
    assert [config.data.date for config in configs] == [MONDAY, MONDAY]


def test_sites_write_the_date_of_the_run_that_they_are_sent(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today(monkeypatch, TUESDAY)
    config = configuration(place, "data.date=2026-03-02")
    here = runs.start(config, tmp_path / "here")
    *_, mine = here.rounds()
    there = runs.start(config, tmp_path / "there", across(sites(place, tmp_path), print))
    *_, theirs = there.rounds()
    assert (theirs.clients, theirs.metrics) == (mine.clients, mine.metrics)
    elsewhere = configuration(place, "data.date=2026-03-04")
    *_, others = runs.start(elsewhere, tmp_path / "other").rounds()
    assert others.clients != mine.clients


def sites(place: Path, state: Path) -> Calls:
    made = {}
    for node, name in enumerate(("site-a", "site-b")):
        folder = str(state / name)
        made[node] = Site(
            SiteConfig(
                name=name,
                data=f"{name}.jsonl",
                state=folder,
                root=place,
                tasks=["causal_lm"],
                messages="chat",
                min_train_rows=1,
                min_score_rows=1,
            )
        )
    return Calls(made)


def test_only_a_run_on_chats_has_a_date(place: Path) -> None:
    assert configuration(place).data.date is None
    assert dated(configuration(place)).data.date == datetime.date.today()
    pairs = configuration(place, "model.task=classification")
    assert dated(pairs).data.date is None


def test_every_answer_of_a_chat_whose_history_is_rewritten_is_trained_on_here_and_at_sites(
    tmp_path: Path,
) -> None:
    make_place(tmp_path, QWEN3, CHAT)
    config = configuration(tmp_path, "train.local_epochs=1", "data.client_test=0.4")
    run = runs.start(config, tmp_path / "here")
    *_, mine = run.rounds()
    assert [len(rows) for rows in run.experiment.rows.shards.values()] == [2, 2]
    assert [one["num_examples"] for one in mine.clients.values()] == [4, 4]
    there = runs.start(config, tmp_path / "there", across(sites(tmp_path, tmp_path), print))
    *_, theirs = there.rounds()
    assert (theirs.clients, theirs.client_metrics) == (mine.clients, mine.client_metrics)
    both = Experiment(config)
    assert len(both.examples) == 12
