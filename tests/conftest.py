"""What several files of tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_site import make_site


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
