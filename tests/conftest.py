"""What several files of tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tiny import tiny_bert
from tiny_site import make_site, write_rows

settings.register_profile("untimed", deadline=None)  # a busy machine breaks no claim
settings.load_profile("untimed")

# Files that run the program as a whole: engines, comparisons, the command line, sites. The other
# files prove the kernel and the guards, and are what `make test` runs.
WIDE = {
    "test_attack_runs",
    "test_bank_parts",
    "test_base",
    "test_card",
    "test_catalogue",
    "test_chat_command",
    "test_chat_runs",
    "test_chats",
    "test_check_gpu",
    "test_checkpoint_head",
    "test_cli",
    "test_compare",
    "test_compare_command",
    "test_template",
    "test_corpus",
    "test_docs",
    "test_deploy",
    "test_doctor",
    "test_engine",
    "test_evaluation",
    "test_experiments",
    "test_export",
    "test_extension",
    "test_federation_folder",
    "test_fetch",
    "test_flower_internals",
    "test_flower_strategy",
    "test_fuzz",
    "test_glue",
    "test_harness",
    "test_hostile_files",
    "test_hostile_models",
    "test_hostile_network",
    "test_hostile_coordinator",
    "test_hostile_sites",
    "test_hostile_updates",
    "test_init_inputs",
    "test_joining",
    "test_listing",
    "test_live",
    "test_memory",
    "test_method_runs",
    "test_models",
    "test_moved",
    "test_notebooks",
    "test_on_card",
    "test_packing",
    "test_peft_round_trip",
    "test_pixel_network",
    "test_plan",
    "test_precision",
    "test_predict",
    "test_preference_runs",
    "test_prefix",
    "test_push",
    "test_readers",
    "test_report",
    "test_report_conclusions",
    "test_robust_runs",
    "test_runs",
    "test_samples",
    "test_scale",
    "test_second_rows",
    "test_server_optimizers",
    "test_several_labels",
    "test_site_faults",
    "test_sites",
    "test_studies",
    "test_tables_of_tokens",
    "test_tasks",
    "test_theory",
    "test_tracking",
    "test_trl_config",
    "test_wiretap",
    "test_workers",
    "test_wrong_questions",
}


# Files that let faults befall the program, run by run: minutes each.
FAULTS = {"test_faults", "test_soak_in_process"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Long tests have figures to report."""
    told = "write the figures of long tests to docs/reliability"
    parser.addoption("--record", action="store_true", help=told)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of which nothing will run; each worker of a run imports what is collected."""
    for mark, files in (("wide", WIDE), ("faults", FAULTS)):
        if f"not {mark}" in config.option.markexpr and collection_path.stem in files:
            return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files above."""
    for item in items:
        if item.path.stem in WIDE:
            item.add_marker(pytest.mark.wide)
        if item.path.stem in FAULTS:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a tiny model with rows for a few clients."""
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """No page for each single run, which is most of the time of a tiny one; signals left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rolora.run.runs.write_report", lambda runs, out: out.write_text("a page\n"))
        patch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and rows under the names that the documents use."""
    tiny_bert(tmp_path / "data" / "minilm")
    write_rows(tmp_path / "mydata.csv", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path
