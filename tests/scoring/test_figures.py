"""Figures that can be read: names inside, text large enough, colours apart, honest curves and axes."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

from scoring.judge import leaderboard, versions
from scoring.judge.rules import Target
from scoring.pages import html, leaderboard_page, report_page
from scoring.read import logs
from scoring.show import curves, palette, panel, svg
from scoring.show.panel import Label, Line, Panel
from tests.scoring.official import PUBLISHED_10
from tests.scoring.trees import official_meta, official_rows, write_runs, write_trial

SVG = "{http://www.w3.org/2000/svg}"
NAMES = list(PUBLISHED_10)


@pytest.fixture(scope="module")
def fonts() -> dict[bool, FT2Font]:
    """DejaVu Sans, regular and bold, as matplotlib brings them: wider than most system fonts."""
    found = {}
    for bold in (False, True):
        path = findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
        found[bold] = FT2Font(path)
        found[bold].set_size(1000, 72)
    return found


def advance(font: FT2Font, text: str, size: float) -> float:
    """Pixels of a text, from the font's own tables."""
    units = sum(font.load_char(ord(character)).linearHoriAdvance / 65536 for character in text)
    return float(units) * size / 1000


def texts(drawn: str) -> list[tuple[str, float, float, float, bool, str]]:
    """Every text of a figure: its words, x, y, size, whether bold, and where it is anchored."""
    found = []
    for node in ET.fromstring(drawn).iter(f"{SVG}text"):
        bold = "font-weight" in node.get("style", "")
        place = (float(node.get("x", "")), float(node.get("y", "")), float(node.get("font-size", "")))
        found.append((node.text or "", *place, bold, node.get("text-anchor", "start")))
    return found


def assert_inside(drawn: str, fonts: dict[bool, FT2Font]) -> None:
    _, _, width, height = map(float, ET.fromstring(drawn).get("viewBox", "").split())
    for words, x, y, size, bold, anchor in texts(drawn):
        across = advance(fonts[bold], words, size)
        left = {"start": x, "middle": x - across / 2, "end": x - across}[anchor]
        assert left >= 0, words
        assert left + across <= width, words
        assert size <= y <= height, words
        assert size >= 11.0, words


NAME = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzMW_-() 0123456789"), min_size=1, max_size=60).map(
    str.strip
)


@settings(max_examples=60, deadline=None)
@example(names=["0", "1", "2", "00", "000", "0" * 35], small=False)
@example(names=[f"{k}" + "W" * 59 for k in range(6)], small=False)
@given(names=st.lists(NAME.filter(bool), min_size=1, max_size=6, unique=True), small=st.booleans())
def test_every_name_lies_inside(fonts: dict[bool, FT2Font], names: list[str], small: bool) -> None:
    x = np.array([0.0, 123456.0])
    lines = [Line(x, np.array([0.0, k]), "c0") for k in range(len(names))]
    labels = [] if small else [Label(1.0, float(k), name) for k, name in enumerate(names)]
    one = Panel(
        names[0], (0.0, 123456.0), (0.0, 6.0), "time (s)", lines=lines, labels=labels, rules=[(3.0, "target 3")]
    )
    one.small = small
    assert_inside(svg.draw(one, "x"), fonts)


def test_the_widths_are_those_of_the_font(fonts: dict[bool, FT2Font]) -> None:
    printable = "".join(map(chr, range(32, 127)))
    assert panel.width_of(printable, 10) == pytest.approx(advance(fonts[False], printable, 10), rel=1e-3)
    for name in NAMES:
        assert panel.width_of(name, 10, bold=True) >= advance(fonts[True], name, 10)


def test_labels_do_not_overlap() -> None:
    places = panel.spaced([5.0, 5.0, 5.0, 100.0, 4.0], 10.0, 0.0, 120.0)
    assert min(abs(a - b) for a, b in itertools.combinations(places, 2)) >= 10.0 - 1e-9
    assert np.argsort(places).tolist() == [4, 0, 1, 2, 3]
    assert min(places) >= 0.0
    assert panel.spaced([50.0, 119.0], 10.0, 0.0, 120.0) == [50.0, 119.0]


# 17 submissions on nine workloads, as published, but made up.


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[leaderboard.Leaderboard, logs.Logs]:
    root = tmp_path_factory.mktemp("many")
    rules = versions.load("1.0", "self")
    for i, name in enumerate(NAMES):
        for j, workload in enumerate(rules.base):
            for study in range(3):
                budget = rules.budget(workload)
                hit = budget * (0.2 + 0.04 * i + 0.02 * study) if (i + j) % 3 else None
                rows = official_rows(workload, hit, "1.0", misses=20)
                folder = root / name / f"study_{study}" / f"{workload}_{'jax' if i % 2 else 'pytorch'}" / "trial_1"
                write_trial(folder, workload, rows, official_meta(workload, "1.0"))
    runs = logs.read(root)
    return leaderboard.build(runs, ruleset="self", replicates=50, shares=(0.05, 0.2)), runs


@pytest.fixture(scope="module")
def page(many: tuple[leaderboard.Leaderboard, logs.Logs]) -> str:
    return html.render(leaderboard_page.build(*many))


def figures(content: str) -> list[str]:
    return [one for one in re.findall(r"<svg .*?</svg>", content, flags=re.DOTALL) if 'role="img"' in one]


def test_figures_of_17_submissions(page: str, fonts: dict[bool, FT2Font]) -> None:
    found = figures(page)
    # Scores in one, profiles, relaxed targets and nine workloads by time and steps in one for each submission.
    assert len(found) == 1 + 17 * (2 + 9 * 2)
    for drawn in found:
        assert_inside(drawn, fonts)
    for name in NAMES:
        assert sum(f">{name}<" in re.sub(r"</text><text[^>]*>", "", drawn) for drawn in found) >= 20
    assert len(page) < 4_000_000
    assert "<script" not in page


def test_one_in_colour_over_all_others_in_grey(page: str) -> None:
    small = [drawn for drawn in figures(page) if "<use " in drawn]
    assert len(small) == 17 * (2 + 9 * 2)
    for drawn in small:
        inside = set(re.findall(r"var\(--(\w+)\)", drawn))
        assert inside <= {"c0"}
    for shared in re.findall(r'<g id="(f\d+-\d+-b)">(.*?)</g>', page, flags=re.DOTALL):
        assert shared[1].count("<path") >= 15
        assert set(re.findall(r"var\(--(\w+)\)", shared[1])) == {"grey"}


def test_every_figure_is_described(page: str) -> None:
    for drawn in figures(page):
        root = ET.fromstring(drawn)
        title, words = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None
        assert words is not None
        assert title.text
        assert words.text
        assert root.get("aria-labelledby") == f"{title.get('id')} {words.get('id')}"


def test_the_first_columns_stay_in_sight(page: str) -> None:
    ranking = page[page.index("<table>") : page.index("</table>")]
    first = re.search(r"<tbody><tr>(.*?)</tr>", ranking, flags=re.DOTALL)
    assert first is not None
    cells = re.findall(r"<t[hd][^>]*>", first[1])
    assert 'class="s0"' in cells[0] or "s0" in cells[0]
    assert "s1" in cells[1]
    assert re.search(r"</th><td[^>]*>\d\.\d{4}</td>", first[1])  # the score is beside the name


# Colours.

DEUTERANOPIA = np.array(  # Machado, Oliveira and Fernandes 2009, full severity, on linear RGB
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


def linear(colour: str) -> npt.NDArray[np.float64]:
    values = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_stay_apart_under_deuteranopia(theme: str) -> None:
    """At least 25 in CIELAB between any two; Okabe and Ito's set, cut to six, came to 1.6."""
    colours = [palette.colour(name, theme) for name in (*(f"c{k}" for k in range(len(palette.LIGHT))), "ink")]
    for one, other in itertools.combinations(colours, 2):
        for seen in (np.eye(3), DEUTERANOPIA):
            assert np.linalg.norm(lab(seen @ linear(one)) - lab(seen @ linear(other))) >= 25, (one, other)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_stand_out_from_the_paper(theme: str) -> None:
    def luminance(colour: str) -> float:
        return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour))

    paper = luminance(palette.PAPER[theme])
    for name in (*(f"c{k}" for k in range(len(palette.LIGHT))), "ink"):
        one = luminance(palette.colour(name, theme))
        assert (max(one, paper) + 0.05) / (min(one, paper) + 0.05) >= 3.0


def test_the_demo_has_few_colours(tmp_path: Path) -> None:
    """Three algorithms in two frameworks: three colours, each solid and dashed, named beside the lines."""
    for framework in ("jax", "pytorch"):
        write_runs(tmp_path / framework, {"nadamw": 1.0, "kfac_expand": 2.2, "kfac_reduce": 1.9})
        for path in sorted((tmp_path / framework).rglob("*_pytorch")):
            path.rename(path.with_name(path.name.replace("pytorch", framework)))
    merged = tmp_path / "all"
    for framework in ("jax", "pytorch"):
        for path in sorted((tmp_path / framework).glob("*/*/*")):
            home = merged / path.relative_to(tmp_path / framework)
            home.parent.mkdir(parents=True, exist_ok=True)
            path.rename(home)
    from scoring.judge import report

    found = report.build(logs.read(merged))
    look = report_page.look_of(found)
    assert {style.colour for style in look.values()} == {"ink", "c0", "c1"}
    assert len({(style.colour, style.dash) for style in look.values()}) == 6
    (drawn,) = report_page.panels(found, logs.read(merged), "bible_lm", look)["step"]
    assert sorted(label.text for label in drawn.labels) == sorted(look)


# Curves and axes.

TARGET = Target("accuracy", 0.9, True)


def curve(end: float, values: list[float], name: str = "a") -> curves.Curve:
    time = np.linspace(end / len(values), end, len(values))
    return curves.Curve(name, time, time, np.array(values))


def test_a_study_that_has_hit_keeps_its_value() -> None:
    """Two studies hit at 10 and 12 s, one at 30 s: the median reaches the target, and goes on to the last."""
    studies = [curve(10, [0.1, 0.91]), curve(12, [0.1, 0.92]), curve(30, [0.1, 0.2, 0.3, 0.4, 0.5, 0.95])]
    x, y = curves.median_curve([(one.time, one.value) for one in studies])
    assert x[-1] == 30
    assert y[-1] == pytest.approx(0.92)
    first = x[np.argmax(y >= TARGET.value)]
    assert 10 <= first <= 12.5
    assert (np.diff(y) >= -1e-12).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(5.0, 50.0), min_size=1, max_size=5))
def test_a_median_of_hits_ends_at_the_target(ends: list[float]) -> None:
    studies = [curve(end, [0.2, 0.5, 0.9]) for end in ends]
    _, y = curves.median_curve([(one.time, one.value) for one in studies])
    assert y[-1] == pytest.approx(0.9)


@pytest.mark.parametrize("higher", [True, False])
def test_one_diverged_run_does_not_set_the_axis(higher: bool) -> None:
    sign = 1.0 if higher else -1.0
    target = Target("metric", sign * 0.9, higher)
    sound = [curve(100, [sign * v for v in (0.1, 0.5, 0.8, 0.91)], f"a{k}") for k in range(4)]
    before = curves.window(sound, target)
    diverged = curve(100, [sign * -1e6, sign * -1e7, sign * -1e8, sign * -1e9], "z")
    after = curves.window([*sound, diverged], target)
    assert after == before
    assert before[0] <= target.value <= before[1]
    long = curve(100_000, [0.1, 0.2], "y")
    assert curves.extent([*sound, long], "time")[1] <= 2.1 * curves.extent(sound, "time")[1]


def test_a_line_outside_the_frame_says_so() -> None:
    names = [f"a{k}" for k in range(8)]
    look = palette.styles([*names, "z"])
    sound = [curve(100, [0.1, 0.5, 0.8, 0.91], name) for name in names]
    drawn = curves.panels("w", TARGET, [*sound, curve(100, [-5.0, -6.0, -7.0, -8.0], "z")], look, "time")
    notes = {one.title: [note.text for note in one.notes] for one in drawn}
    assert notes["z"] == [" outside: -5"]
    assert notes["a0"] == []


def test_the_target_is_named_over_the_lines() -> None:
    look = palette.styles(["a"])
    (one,) = curves.panels("w", TARGET, [curve(100, [0.1, 0.5, 0.8, 0.91])], look, "time")
    drawn = svg.draw(one, "x")
    words = [words for words, *_ in texts(drawn)]
    assert "target 0.9" in words
    assert drawn.rindex('class="line"') > drawn.index('class="rule"')
    assert drawn.index("target 0.9</text>") > drawn.index(
        "</g>"
    )  # behind it in the file is in front of it in sight


def test_ticks_are_round() -> None:
    assert [text for _, text in panel.ticks(0.0, 98000.0)] == ["0", "20k", "40k", "60k", "80k"]
    assert [value for value, _ in panel.ticks(0.7, 0.78)] == pytest.approx([0.7, 0.72, 0.74, 0.76, 0.78])
