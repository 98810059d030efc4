"""The report page as Chromium lays it out, on a desktop and a phone, in light and in dark.

What axe-core finds is tested where it is installed: ``npm install axe-core``, here or in a folder
of NODE_PATH.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT
from synthetic_runs import gallery

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MODULES = [str(ROOT / "node_modules"), *os.environ.get("NODE_PATH", "").split(os.pathsep)]
AXE = next(
    filter(Path.is_file, (Path(folder) / "axe-core" / "axe.min.js" for folder in MODULES)), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH"),
]

# Contrast as WCAG 2.2 defines it. What lies in .scroll or pre may be wider: it scrolls by itself.
# Of a curve the figures against all axes are measured, not only the one that is shown.
MEASURE = """
document.querySelectorAll(".axes figure").forEach(figure => { figure.style.display = "block"; });
const box = element => element.getBoundingClientRect();
const short = element => element.textContent.trim().slice(0, 40);
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = parts(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  throw Error("nothing opaque behind " + short(element));
};
const contrast = element => {
  const style = getComputedStyle(element);
  const ink = parts(element instanceof SVGElement ? style.fill : style.color);
  const [low, high] = [luminance(ink), luminance(behind(element))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const all = [...document.querySelectorAll("main, main *")].filter(e => e.checkVisibility());
const words = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
const texts = [...document.querySelectorAll("figure > svg")].map(
  svg => [svg, [...svg.querySelectorAll("text")]]);
const labels = texts.map(([svg, each]) => [svg, each.filter(t => !t.closest(".value"))]);
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;  // a line box has empty edges
parent.document.body.textContent = JSON.stringify({
  width: innerWidth,
  scrolls: document.documentElement.scrollWidth,
  dark: luminance(parts(getComputedStyle(document.body).backgroundColor)) < 0.5,
  texts: words.length,
  labels: labels.flatMap(([, texts]) => texts).length,
  outside: all.filter(e => !e.closest(".scroll *, pre"))
    .filter(e => box(e).left < -0.5 || box(e).right > innerWidth + 0.5).map(short),
  readouts: document.querySelectorAll(".value").length,
  leaving: texts.flatMap(([svg, texts]) => texts.filter(t =>
    box(t).left < box(svg).left - 1 || box(t).right > box(svg).right + 1 ||
    box(t).top < box(svg).top - 1 || box(t).bottom > box(svg).bottom + 1)).map(short),
  overlapping: labels.flatMap(([, texts]) => texts.flatMap((a, i) =>
    texts.slice(i + 1).filter(b => meet(box(a), box(b))).map(b => [short(a), short(b)]))),
  small: labels.flatMap(([svg, texts]) => texts.filter(t => box(t).height < 10)).map(short),
  covering: [...document.querySelectorAll("td, th")].filter(
    e => e.scrollWidth > e.clientWidth + 1).map(short),
  faint: words.filter(e => contrast(e) < 4.5).map(e => [short(e), contrast(e)]),
});
"""


CUT_OFF = """
const all = [...document.querySelectorAll("main *")].filter(e => e.checkVisibility());
parent.document.body.textContent = JSON.stringify({
  controls: all.filter(e => e.matches("legend, label")).length,
  tables: all.filter(e => e.matches("table")).length,
  outside: all.filter(e => e.getBoundingClientRect().right > innerWidth + 0.5
      || ["auto", "scroll"].includes(getComputedStyle(e).overflowX)
      && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.trim().slice(0, 40)),
});
"""
CHOOSE = """
parent.document.body.textContent = JSON.stringify([...document.querySelectorAll(".axes")].map(
  axes => [...axes.querySelectorAll("input")].map(input => {
    input.click();
    return [...axes.querySelectorAll("figure")].filter(e => e.checkVisibility())
      .map(e => e.querySelector("h3").textContent);
  })));
"""
VIOLATIONS = """
axe.run(document, {resultTypes: ["violations"]}).then(found => {
  parent.document.body.textContent = JSON.stringify(
    found.violations.flatMap(one => one.nodes.map(node => [one.id, node.html])));
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return gallery(tmp_path_factory.mktemp("gallery"))


def answer(script: str, page: Path, width: int, dark: bool, scratch: Path) -> Any:
    """What ``script``, run in ``page``, writes as JSON into the body of the parent document.

    The page is in a frame ``width`` pixels wide, because a window is never narrower than 500. What
    a reader can open is open.
    """
    assert CHROMIUM is not None
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())  # it forbids scripts, ours too
    text = text.replace("</body>", f"<script>{script}</script></body>").replace(
        "<details>", "<details open>"
    )
    frame = f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:900px;border:0">'
    (scratch / "frame.html").write_text(f"<!doctype html><body>{frame}</iframe></body>")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={scratch / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=60000",  # of simulated ms: time for promises
        *("--window-size=1400,1000", "--dump-dom", (scratch / "frame.html").as_uri()),
    ]
    done = subprocess.run(
        [CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True
    )
    body = re.search(r"<body>(.*)</body>", done.stdout, flags=re.DOTALL)
    assert body is not None, done.stderr
    return json.loads(html.unescape(body[1]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("number", range(4), ids=["three", "one", "eight", "twenty"])
def test_nothing_overflows_overlaps_or_is_faint(
    pages: list[Path], number: int, width: int, dark: bool, tmp_path: Path
) -> None:
    found = answer(MEASURE, pages[number], width, dark, tmp_path)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["texts"] > 30
    assert found["labels"] > 30
    assert found["readouts"] > 30
    assert found["scrolls"] <= width
    assert found["outside"] == []
    assert found["leaving"] == []
    assert found["overlapping"] == []
    assert found["small"] == []
    assert found["covering"] == []
    assert found["faint"] == []


def test_choosing_an_axis_shows_the_figure_against_it_and_no_other(
    pages: list[Path], tmp_path: Path
) -> None:
    names = ("rounds", "megabytes sent", "seconds", "local steps")
    assert answer(CHOOSE, pages[0], 1280, False, tmp_path) == [
        *([[f"{curve} against {n}"] for n in names] for curve in ("accuracy", "training loss")),
        [["Effective rank of B·A"], ["Norm of A"], ["Norm of B"]],
    ]


@pytest.mark.parametrize("number", range(4), ids=["three", "one", "eight", "twenty"])
def test_on_paper_nothing_is_cut_off_and_no_control_is_printed(
    pages: list[Path], number: int, tmp_path: Path
) -> None:
    printed = tmp_path / "printed.html"
    printed.write_text(pages[number].read_text().replace("@media print", "@media all"))
    found = answer(CUT_OFF, printed, 718, False, tmp_path)  # pixels of A4 between its margins
    assert found["tables"] >= 2
    assert (found["outside"], found["controls"]) == ([], 0)


@pytest.mark.skipif(AXE is None, reason="no axe-core: npm install axe-core")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("number", range(4), ids=["three", "one", "eight", "twenty"])
def test_axe_finds_no_barrier(pages: list[Path], number: int, dark: bool, tmp_path: Path) -> None:
    assert AXE is not None
    script = AXE.read_text().replace("</script", r"<\/script") + VIOLATIONS
    assert answer(script, pages[number], 390 if dark else 1280, dark, tmp_path) == []
