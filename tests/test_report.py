"""The report page: whole in one file, the same for the same runs, and unharmed by what runs say."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from rolora.errors import ConfigError
from rolora.report.figures import (
    ROUNDING,
    Series,
    aggregation_errors,
    curves,
    dots,
    elided,
    key,
    save_picture,
    split_figure,
)
from rolora.report.page import write_report
from rolora.report.svg import inline_svg
from rolora.results.runs import by_method, load_run
from rolora.results.samples import side_by_side

HOSTILE = '"><img src=x onerror=alert(1)> </pre><script>alert(2)</script> & $x_1$ {{ 7 * 7 }}'


class Page(HTMLParser):
    """What a browser would make of a page: its tags with attributes, and its text by tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, own in self.tags if (value := own.get(attribute)) is not None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compared")
    return [
        write_run(folder / f"{method}-seed{seed}", method, seed=seed, clients=6, rounds=10)
        for method in ("rolora", "fedit")
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def html(runs: list[Path]) -> str:
    return write_report(runs, runs[0].parent / "page.html").read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    run = write_run(
        folder / "run <b>",
        HOSTILE,
        name=HOSTILE,
        labels=(HOSTILE, "$x_1$"),
        clients=3,
        rounds=10,
        options={HOSTILE: HOSTILE},
        rejected={HOSTILE: HOSTILE},
    )
    said = dict.fromkeys(("prompt", "expected", "before"), HOSTILE)
    (run / "samples.json").write_text(json.dumps([{**said, "after": "\n"}]))
    return write_report([run], folder / "page.html").read_text()


def test_the_same_folders_give_the_same_bytes_in_another_process_too(
    runs: list[Path], html: str, tmp_path: Path
) -> None:
    out = tmp_path / "again.html"
    code = "import sys, pathlib as p; from rolora.report.page import write_report as w\n"
    code += "w([p.Path(a) for a in sys.argv[2:]], p.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(out), *map(str, runs)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert out.read_text() == html


@pytest.mark.parametrize("which", ["html", "hostile"])
def test_a_page_fetches_nothing_and_runs_nothing(
    which: str, request: pytest.FixtureRequest
) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "img", "base"} == set()
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert page.values("src") == []
    assert not [name for _, own in page.tags for name in own if name.startswith("on")]
    assert all(hit.startswith("#") for hit in re.findall(r"url\(\s*([^)]*)", text))
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in page.values("content")[0]


def test_hostile_names_are_shown_as_they_are(hostile: str) -> None:
    page = Page(hostile)
    assert page.text["h1"] == [HOSTILE]
    assert page.text["title"] == [f"{HOSTILE} · rolora"]
    assert [cell for cell in page.text["td"] if cell == HOSTILE] == [HOSTILE] * 2  # client, reason
    assert f"{HOSTILE} ({HOSTILE}={HOSTILE})" in page.text["span"]
    assert page.text["dd"] == [HOSTILE, HOSTILE, HOSTILE, ""]
    assert {elided(HOSTILE, 16), "$x_1$"} <= set(page.text["text"])


def test_every_id_of_a_page_is_there_once_and_every_reference_has_its_target(html: str) -> None:
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for value in page.values("href") if value.startswith("#")}
    assert wanted | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_the_settings_of_every_run_are_on_the_page(runs: list[Path], html: str) -> None:
    shown = [tomllib.loads(text) for text in Page(html).text["pre"]]
    assert shown == [load_run(run).config for run in runs]
    assert [f"{run.parent.name}/{run.name}" for run in runs] == Page(html).text["summary"][-4:]


def test_versions_are_on_the_page_and_the_folder_of_the_run_is_not(
    runs: list[Path], tmp_path: Path
) -> None:
    moved = write_run(tmp_path / "moved", "rolora", seed=5, clients=6, rounds=10)
    text = (moved / "config.toml").read_text().replace("2.13.0", "2.14.1")
    (moved / "config.toml").write_text(text)
    html = write_report([*runs, moved], tmp_path / "page.html").read_text()
    assert "The same in all runs: python 3.11.7; rolora 0.1.0; git commit: 5905833d26" in html
    cells = Page(html).text["td"]
    assert (cells.count("2.13.0"), cells.count("2.14.1")) == (4, 1)
    assert "secret-project" not in html


@pytest.mark.parametrize("rounds", [[4], [3, 4], [1, 2, 3]])
def test_the_axis_of_rounds_has_whole_numbers_alone(rounds: list[float]) -> None:
    lines = [Series(0, rounds, [0.5] * len(rounds), [None] * len(rounds))]
    (axes,) = curves(lines, "accuracy", "round").axes
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_every_split_is_on_the_page_once_with_the_runs_that_trained_on_it(
    runs: list[Path], html: str
) -> None:
    for number, seed in enumerate((0, 1)):
        clients = json.loads((runs[seed] / "partition.json").read_text())["clients"]
        sizes = [client["num_examples"] for client in clients]
        caption = f"6 clients hold {min(sizes)} to {max(sizes)} rows each. 2 clients topped up"
        assert caption in html
        assert f"Who holds which rows ({number + 1} of 2)" in html
        folder = runs[seed].parent.name
        assert f"The split of {folder}/rolora-seed{seed}, {folder}/fedit-seed{seed}." in html
    assert "(3 of" not in html


def client_values(runs: Sequence[Path], method: str) -> list[float]:
    """The mean of the evaluations after round 5, of B, and round 10, of A."""
    each = [
        [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        for run in runs
        if run.name.startswith(method)
    ]
    return [
        (lines[5]["client_metrics"][client]["accuracy"] + own["accuracy"]) / 2
        for lines in each
        for client, own in lines[10]["client_metrics"].items()
    ]


def test_mean_and_worst_tenth_of_clients_are_on_the_page_where_clients_were_measured(
    runs: list[Path], html: str, tmp_path: Path
) -> None:
    for method in ("rolora", "fedit"):
        values = client_values(runs, method)
        low = [min(values[:6]), min(values[6:])]  # one client is a tenth of six
        worst = f"{sum(low) / 2:.3f}"
        words = f"{method}: mean {sum(values) / 12:.3f}, worst tenth {worst}"
        assert words in Page(html).text["text"]
        assert f"{worst} ± {abs(low[0] - low[1]) / 2**0.5:.3f}" in Page(html).text["td"]
    unmeasured = write_run(tmp_path / "a", rounds=10, per_client=False)
    page = write_report([unmeasured], tmp_path / "page.html").read_text()
    assert "of each client" in html
    assert "accuracy of each client" not in page
    assert "worst tenth" not in page.lower()


def test_a_point_of_a_curve_tells_what_was_spent_by_then_on_each_axis(
    runs: list[Path], html: str
) -> None:
    lines = [
        [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
        for run in runs[:2]  # both seeds of rolora
    ]
    last = [own[-1]["metrics"]["accuracy"] for own in lines]
    value = f"{sum(last) / 2:.3f} ± {abs(last[0] - last[1]) / 2**0.5:.3f}"
    sent = sum(line["bytes_up"] for own in lines for line in own) / 2e6
    seconds = sum(line["seconds"] for own in lines for line in own) / 2
    shown = Page(html).text["text"]
    assert f"rolora, round 10: {value}" in shown
    assert f"rolora, {sent:.4g} MB: {value}" in shown
    assert f"rolora, {seconds:.4g} s: {value}" in shown
    assert f"rolora, 150 steps: {value}" in shown  # 10 rounds of 3 clients with 5 steps each
    row = ["rolora", "10", f"{sent:.4g}", f"{seconds:.4g}", "150", value]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", html)]
    assert any(cells[n : n + 6] == row for n in range(len(cells)))


def test_a_page_about_twenty_long_runs_is_smaller_than_five_megabytes(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{number}", f"method_{number % 10}", seed=number // 10, rounds=1000)
        for number in range(20)
    ]
    page = write_report(runs, tmp_path / "page.html")
    assert page.stat().st_size < 5e6
    assert "method_0, round 1000: " in page.read_text()
    assert "Of more than 300 rounds, every n-th is drawn." in page.read_text()
    assert "4 more" in Page(page.read_text()).text["summary"]  # of the ten methods of a ranking


def test_the_recall_of_each_label_is_on_the_page_the_least_found_first(
    runs: list[Path], html: str
) -> None:
    found = {}
    for run in runs:
        lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        phases = lines[5]["recall"], lines[10]["recall"]  # of B, and of A
        found[run.name] = [sum(pair) / 2 for pair in zip(*phases, strict=True)]
    means = {
        method: [
            sum(pair) / 2
            for pair in zip(found[f"{method}-seed0"], found[f"{method}-seed1"], strict=True)
        ]
        for method in ("rolora", "fedit")
    }
    labels = json.loads((runs[0] / "axes.json").read_text())["labels"]
    order = sorted(range(len(labels)), key=lambda n: means["rolora"][n] + means["fedit"][n])
    shown = html.split("Recall of each label</h2>")[1].split("</table>")[0]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", shown)]
    assert cells[::4] == [list(labels)[n] for n in order]
    assert cells[1::4] == [str(list(labels.values())[n]) for n in order]
    for place, n in enumerate(order):
        for column, method in enumerate(("rolora", "fedit")):
            assert cells[4 * place + 2 + column].startswith(f"{means[method][n]:.3f} ± ")


def test_a_page_stays_small_with_150_labels_and_so_does_a_round(tmp_path: Path) -> None:
    labels = [f"an_intent_with_a_long_name_{n}" for n in range(150)]
    runs = [
        write_run(tmp_path / f"{n}", f"method_{n}", rounds=10, labels=labels, per_client=False)
        for n in range(10)
    ]
    line = json.loads((runs[0] / "rounds.jsonl").read_text().splitlines()[-1])
    assert len(json.dumps(line["recall"])) < 1500  # bytes: names are in axes.json, once
    assert write_report(runs, tmp_path / "page.html").stat().st_size < 5e6


def test_the_median_and_range_over_layers_are_on_the_page_and_each_layer_in_a_table(
    runs: list[Path], html: str
) -> None:
    assert "rolora, round 10: 1.75 (1.5 to 2)" in Page(html).text["text"]  # norms of A
    assert "fedit, round 10: 1.4 (0.4 to 2.4)" in Page(html).text["text"]  # norms of B
    last = [json.loads((r / "rounds.jsonl").read_text().splitlines()[-1]) for r in runs[:2]]
    ranks = [line["layers"]["effective_rank"][0] for line in last]
    rank = f"{statistics.fmean(ranks):.3g} ± {statistics.stdev(ranks):.3g}"
    shown = html.split("by layer, at the end</summary>")[1].split("</table>")[0]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", shown)]
    layer = "encoder.layer.0.attention.self.query"
    assert cells[:5] == [layer, "rolora", rank, "1.5 ± 0", "0.4 ± 0"]
    assert cells[5 * 5 + 1 : 5 * 5 + 5] == ["rolora", "not defined", "2 ± 0", "2.4 ± 0"]
    assert len(cells) == 2 * 6 * 5


def test_a_caption_says_of_a_method_that_is_not_drawn_what_is_true_of_it(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, name, clients=6, rounds=10)
        for name in ("rolora", "fedit", "local")
    ]
    file = runs[1] / "rounds.jsonl"  # as an older version has written it
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line.pop("layers", None)
        line |= {"aggregation_error": None, "loss": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(runs, tmp_path / "page.html").read_text())
    titles = [title for title in page.text["h3"] if title]
    captions = dict(zip(titles, page.text["figcaption"], strict=True))
    unrecorded = " Not drawn (not recorded in all of its runs): "
    for title in ("Norm of A", "Effective rank of B·A", "Aggregation error"):
        assert captions[title].endswith(f"{unrecorded}fedit, local."), title
    assert captions["training loss against rounds"].endswith(f"{unrecorded}fedit.")
    sent = captions["training loss against megabytes sent"]
    assert sent.endswith(f"{unrecorded}fedit. Not drawn (no megabytes sent): local.")
    assert "Not drawn" not in captions["accuracy against seconds"]


def test_answers_before_and_after_are_side_by_side_each_in_the_direction_of_its_text(
    tmp_path: Path,
) -> None:
    runs = [write_run(tmp_path / name, name, rounds=10) for name in ("rolora", "fedit")]
    for run, answer in zip(runs, (" باريس", "Paris\nof course"), strict=True):
        one = {"prompt": "what?\nsay:", "expected": "Paris", "before": "", "after": answer}
        (run / "samples.json").write_text(json.dumps([one]))
    html = write_report(runs, tmp_path / "page.html").read_text()
    page = Page(html)
    assert page.text["dt"] == ["prompt", "expected", "before", "rolora, after", "fedit, after"]
    assert page.text["dd"] == ["what?\nsay:", "Paris", "", "باريس", "Paris\nof course"]
    assert "empty: the text ended at once" in page.text["span"]
    assert [own.get("dir") for tag, own in page.tags if tag == "dd"] == ["auto"] * 5


def test_of_several_seeds_only_the_prompts_of_the_first_are_on_the_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{n}", seed=n, clients=4, rounds=5) for n in (2, 0, 1)]
    for run, seed in zip(runs, (2, 0, 1), strict=True):
        one = dict.fromkeys(("expected", "before", "after"), "x") | {"prompt": f"of seed {seed}"}
        (run / "samples.json").write_text(json.dumps([one]))
    (sample,) = side_by_side(by_method(map(load_run, runs)))
    assert sample.prompt == "of seed 0"
    assert sample.answers == [("before", "x"), ("rolora, after", "x")]


def test_a_method_that_sends_nothing_has_no_curve_against_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "local", clients=6, rounds=10)
    html = write_report([run], tmp_path / "page.html").read_text()
    assert "accuracy against seconds" in html
    assert "accuracy against megabytes" not in html


def test_updates_that_were_rejected_and_that_did_not_come_are_apart_the_most_frequent_first(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "a", clients=6, rounds=10)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for number in (6, 7, 8, 10):
        lines[number]["rejected"] = {"client-001": "not finite"}
        lines[number]["missing"] = {"client-002": "no answer before the deadline"}
    lines[5]["rejected"] = {f"client-{n:03d}": "too large" for n in range(120)}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report([run], tmp_path / "page.html").read_text()
    cells = Page(html.split("Rejected updates</h2>")[1].split("</table>")[0]).text["td"]
    assert cells[1:5] == ["client-001", "not finite", "4", "6-8, 10"]
    assert cells[6:10] == ["client-000", "too large", "1", "5"]
    assert len(cells) == 100 * 5
    assert "21 more, less frequent ones" in html
    cells = Page(html.split("Updates that did not come</h2>")[1].split("</table>")[0]).text["td"]
    assert cells[1:] == ["client-002", "no answer before the deadline", "4", "6-8, 10"]


def test_an_aggregation_error_of_zero_or_rounding_lies_in_the_exact_band() -> None:
    figure = aggregation_errors(
        [
            Series(0, [1, 2], [0.0, ROUNDING], [None, None]),
            Series(1, [1, 2], [3e-8, 2 * ROUNDING], [None, None]),
        ]
    )
    axes = figure.axes[0]
    low, _ = axes.get_ylim()
    lines: Any = axes.lines
    first, second = (list(line.get_ydata()) for line in lines)
    assert all(low < y < ROUNDING for y in [*first, second[0]])
    assert second[1] == 2 * ROUNDING
    ticks = {
        label.get_text(): at
        for label, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
    }
    assert low < ticks["exact"] < ROUNDING
    assert ticks["10⁻⁵"] == 1e-5


def test_methods_can_be_told_apart_without_colour() -> None:
    grey = set()
    for style in range(16):
        drawing = inline_svg(key(style), "key")
        drawing = re.sub(r"var\(--series-\d\)", "grey", drawing)
        grey.add(re.sub(r'id="[^"]*"|"#[^"]*"|url\(#[^)]*\)', "", drawing))
    assert len(grey) == 16


def test_a_method_has_the_colour_and_the_marker_of_the_legend_in_every_figure() -> None:
    styles = {f"method {number}": number for number in range(10)}
    drawn = dots({"no attack": dict.fromkeys(styles, 0.5)}, styles, "accuracy").axes[0].lines
    legend = [key(number).axes[0].lines[0] for number in styles.values()]
    shown = [(line.get_color(), line.get_marker()) for line in drawn]
    assert shown == [(line.get_color(), line.get_marker()) for line in legend]
    assert len(set(shown)) == len(styles)


def test_a_picture_takes_its_colours_from_the_page(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) > 6
    assert not [hit for one in drawings for hit in re.findall(r"(?:fill|stroke): #\w+", one)]
    named = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert named <= set(re.findall(r"(--[\w-]+):", html))


@pytest.mark.parametrize(("name", "start"), [("split.png", b"\x89PNG"), ("split.svg", b"<?xml")])
def test_a_split_is_saved_as_the_picture_its_name_says(
    runs: list[Path], tmp_path: Path, name: str, start: bytes
) -> None:
    save_picture(split_figure(load_run(runs[0]).partition), tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_a_split_is_saved_in_no_other_format(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"saved as \.png or \.svg, not as 'split\.pdf'"):
        save_picture(split_figure(load_run(runs[0]).partition), tmp_path / "split.pdf")


def test_a_report_on_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run folder"):
        write_report([], tmp_path / "page.html")
