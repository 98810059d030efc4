"""A federation on one machine, made from a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from rolora.config.load import load_config

pytest.importorskip("flwr", reason="sites need Flower")


def test_a_trial_and_the_run_that_it_was_made_from_do_not_share_a_run_folder(
    site: Path, tmp_path: Path
) -> None:
    from rolora.sites.local_trial import make_trial

    make_trial(tmp_path / "federation", str(site), [], 2, 19092)
    trial = load_config(tmp_path / "federation" / "run.toml")
    assert trial.name == f"{load_config(site).name}-at-sites"
