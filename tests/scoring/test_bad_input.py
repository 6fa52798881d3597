"""Each kind of damaged log: what is reported, what the damaged trial is worth; all other trials keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.judge import trials, versions
from scoring.read import logs
from scoring.read.logs import Logs
from tests.scoring.trees import plain, write_trial

HIT = 70  # the step at which plain() reaches its target
Damage = Callable[[str], str]


def csv(table: pd.DataFrame | None = None) -> str:
    return (plain() if table is None else table).to_csv(index=False)


def tree(root: Path, content: str | bytes) -> Path:
    """A sound submission with one trial, and one whose only trial has the given measurements."""
    write_trial(root / "sound" / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", plain())
    bad = write_trial(root / "damaged" / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", None)
    path = bad / "eval_measurements.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def judged(runs: Logs) -> pd.DataFrame:
    table = trials.reach(runs, versions.rules_for(runs.trials)).set_index("submission")
    assert table.loc["sound", "state"] == "hit"
    assert table.loc["sound", "steps"] == HIT
    assert table.loc["sound", "time"] == float(HIT)
    return table


def found(runs: Logs) -> set[str]:
    return set(runs.oddities["what"])


def after(line: int, extra: str) -> Damage:
    """Insert a line behind line number ``line`` (the header is 0)."""

    def damage(text: str) -> str:
        lines = text.splitlines(keepends=True)
        return "".join([*lines[: line + 1], extra.replace("HEADER", lines[0].strip()) + "\n", *lines[line + 1 :]])

    return damage


def cell(line: int, column: str, value: str) -> Damage:
    """Replace one field by text."""

    def damage(text: str) -> str:
        lines = text.splitlines()
        fields = lines[line].split(",")
        fields[lines[0].split(",").index(column)] = value
        lines[line] = ",".join(fields)
        return "\n".join(lines) + "\n"

    return damage


def without(*columns: str) -> Damage:
    return lambda text: csv(plain().drop(columns=list(columns)))


def several(*damages: Damage) -> Damage:
    def damage(text: str) -> str:
        for one in damages:
            text = one(text)
        return text

    return damage


LOSS, TIME, STEP, SCORE = "validation/loss", "accumulated_submission_time", "global_step", "score"
# name, damage, what is reported, the step of the hit that remains (None: no hit)
CASES: list[tuple[str, Damage, str, int | None]] = [
    ("truncated last line", lambda text: text[:-30], "truncated last line", HIT),
    ("one field too many", after(2, "1,0,25,25,0,25,31,0.1,0.1,1000,7"), "wrong number of fields", HIT),
    ("one field too few", after(2, "1,0,25,25,0,25,31,0.1,0.1"), "wrong number of fields", HIT),
    (
        "one too many and one too few",
        several(after(1, "1,2,3"), after(3, "1" + 17 * ",2")),
        "wrong number of fields",
        HIT,
    ),
    ("repeated header", after(4, "HEADER"), "repeated header", HIT),
    ("NUL bytes", after(2, "1,0,25,25,0,25,31,0.1,0.1,10\0\0"), "NUL bytes", HIT),
    ("a block of NUL bytes at the end", lambda text: text + "\0" * 512, "NUL bytes", HIT),
    ("blank lines", after(3, ""), "blank line", HIT),
    ("empty file", lambda text: "", "empty file", None),
    ("only NUL bytes", lambda text: "\0" * 4096, "blank file", None),
    ("header only", lambda text: text.splitlines()[0] + "\n", "header only", None),
    ("no header", lambda text: "\n".join(text.splitlines()[1:]) + "\n", "no header", None),
    ("missing metric column", without(LOSS), "no target metric", None),
    ("missing score column", without(SCORE), "no score", HIT),
    ("missing submission time", without(TIME), "no accumulated submission time", HIT),
    ("no time at all", without(SCORE, TIME), "no time", None),
    ("no step", without(STEP), "no step", None),
    ("NaN metric", cell(7, LOSS, "nan"), "missing metric", 80),
    ("empty metric", cell(7, LOSS, ""), "missing metric", 80),
    ("infinite metric", cell(3, LOSS, "-inf"), "infinite metric", HIT),
    ("text in a metric", cell(7, LOSS, "oops"), "not a number", 80),
    ("half a number", cell(3, LOSS, "1.2e-"), "not a number", HIT),
    ("negative time", several(cell(3, SCORE, "-5"), cell(3, TIME, "-5")), "negative time", HIT),
    ("zero time", several(cell(3, SCORE, "0"), cell(3, TIME, "0")), "zero time", HIT),
    ("decreasing time", several(cell(5, SCORE, "12"), cell(5, TIME, "12")), "decreasing time", HIT),
    ("a time far too large", several(cell(5, SCORE, "9e9"), cell(5, TIME, "9e9")), "decreasing time", HIT),
    ("negative step", cell(3, STEP, "-30"), "impossible step", HIT),
    ("a step and a half", cell(3, STEP, "30.5"), "impossible step", HIT),
    ("a step far too small", cell(6, STEP, "3"), "steps and times disagree", HIT),
    ("duplicate step", after(6, "6,0,60,60,0,60,71,0.1,0.1,1000"), "duplicate steps", HIT),
    ("score below the accumulated time", cell(7, SCORE, "1"), "score is not the accumulated time", HIT),
    ("carriage returns", lambda text: text.replace("\n", "\r\n"), "", HIT),
    ("byte order mark", lambda text: "\ufeff" + text, "", HIT),
    ("quoted fields", lambda text: text.replace("global_step", '"global_step"'), "", HIT),
    ("times beyond the total", cell(3, "total_duration", "2"), "times exceed the total", HIT),
    ("another header halfway", after(5, "HEADER,extra"), "wrong number of fields", None),
]


@pytest.mark.parametrize(("damage", "what", "hit"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_damage(tmp_path: Path, damage: Damage, what: str, hit: int | None) -> None:
    text = csv()
    damaged = damage(text)
    assert damaged != text
    runs = logs.read([tree(tmp_path, damaged)])
    table = judged(runs)
    if what:
        assert what in found(runs)
        mine = runs.oddities[runs.oddities["what"] == what]
        assert all("damaged" in where for where in mine["where"])
        assert (mine["action"] != "").all()
    else:
        assert runs.oddities.empty
    if hit is None:
        assert table.loc["damaged", "state"] != "hit"
        assert np.isinf(table.loc["damaged", "steps"])
    else:
        assert table.loc["damaged", "steps"] == hit
        assert table.loc["damaged", "time"] == float(hit)


def test_sound_logs_have_no_oddity(tmp_path: Path) -> None:
    runs = logs.read([tree(tmp_path, csv())])
    assert runs.oddities.empty
    assert judged(runs).loc["damaged", "steps"] == HIT


def test_a_cut_number_is_no_hit(tmp_path: Path) -> None:
    """The last loss is 12.25; a crash left "1" of it, which would be a hit."""
    rows = plain(rows=5).drop(columns="validation/num_examples")
    rows.loc[4, LOSS] = 12.25
    text = rows.to_csv(index=False)
    assert text.endswith(",12.25\n")
    runs = logs.read([tree(tmp_path, text[:-5])])
    assert judged(runs).loc["damaged", "state"] != "hit"
    assert "truncated last line" in found(runs)
    assert runs.trials.set_index("submission").loc["damaged", "evaluations"] == 5


def test_impossible_accuracy_is_no_hit(tmp_path: Path) -> None:
    rows = plain().rename(columns={LOSS: "validation/accuracy", "train/loss": "train/accuracy"})
    rows["validation/accuracy"] = np.linspace(0.5, 0.95, 10)
    rows.loc[1, "validation/accuracy"] = 97.0
    write_trial(tmp_path / "a" / "mnist_vit_pytorch" / "trial_1", "mnist_vit", rows)
    runs = logs.read([tmp_path])
    reached = trials.reach(runs, versions.rules_for(runs.trials))
    assert reached["steps"].tolist() == [100.0]
    assert "impossible metric" in found(runs)


@pytest.mark.parametrize("offset", [0.0, 15.0], ids=["the clock goes back too", "the clock runs on"])
def test_resumed_run(tmp_path: Path, offset: float) -> None:
    """What ran after the checkpoint at step 40 was thrown away: its hit does not count, the later one does."""
    first = plain(rows=6)
    first.loc[5, LOSS] = 1.0
    second = plain().iloc[4:].copy()
    second["preemption_count"] = 1
    for name in (SCORE, TIME, "total_duration"):
        second[name] += offset
    runs = logs.read([tree(tmp_path, csv(pd.concat([first, second])))])
    table = judged(runs)
    assert table.loc["damaged", "steps"] == HIT
    assert table.loc["damaged", "time"] == HIT + offset
    assert "resumed run" in found(runs)


def test_a_resume_that_was_not_counted(tmp_path: Path) -> None:
    first = plain(rows=6)
    first.loc[5, LOSS] = 1.0
    second = plain().iloc[4:].copy()
    for name in (SCORE, TIME, "total_duration"):
        second[name] += 15.0
    runs = logs.read([tree(tmp_path, csv(pd.concat([first, second])))])
    assert judged(runs).loc["damaged", "steps"] == HIT
    assert "resumed run" in found(runs)


def test_unordered_rows_are_sorted(tmp_path: Path) -> None:
    runs = logs.read([tree(tmp_path, csv(plain().sample(frac=1, random_state=3)))])
    assert judged(runs).loc["damaged", "steps"] == HIT
    assert found(runs) == {"unordered steps"}
    mine = runs.evals[runs.evals["submission"] == "damaged"]
    assert mine["step"].tolist() == list(range(10, 101, 10))


def test_unreadable_bytes(tmp_path: Path) -> None:
    runs = logs.read([tree(tmp_path, csv().encode() + b"\xff\xfe\x80,1,2\n")])
    assert judged(runs).loc["damaged", "steps"] == HIT
    assert "wrong number of fields" in found(runs)


def test_a_long_file(tmp_path: Path) -> None:
    rows = plain(rows=200_000, slope=2e-6, ms=0.1)
    runs = logs.read([tree(tmp_path, csv(rows))])
    assert judged(runs).loc["damaged", "steps"] == rows.loc[rows[LOSS] <= 1.7, STEP].iloc[0] > 1_000_000
    assert runs.trials.set_index("submission").loc["damaged", "evaluations"] == 200_000


def test_a_long_damaged_file(tmp_path: Path) -> None:
    rows = plain(rows=50_000, slope=1e-5, ms=0.1)
    runs = logs.read([tree(tmp_path, csv(rows).replace("\n", "\nbroken\n", 1))])
    assert judged(runs).loc["damaged", "steps"] == rows.loc[rows[LOSS] <= 1.7, STEP].iloc[0] > 200_000
    assert "wrong number of fields" in found(runs)


def test_damaged_json_costs_no_measurement(tmp_path: Path) -> None:
    root = tree(tmp_path, csv())
    bad = root / "damaged" / "study_0" / "bible_lm_pytorch" / "trial_1"
    (bad / "hparams.json").write_text('{"learning_rate": 0.0')
    (bad / "flags_0.json").write_text("[1, 2]")
    runs = logs.read([root])
    assert judged(runs).loc["damaged", "steps"] == HIT
    assert (runs.oddities["what"] == "unreadable JSON").sum() == 2


BAD_ROWS = st.sampled_from(
    [
        "",
        "HEADER",
        "1,2,3",
        "1,0,25,25,0,25,31,0.1,0.1,1000,7,8",
        "a,b,c,d,e,f,g,0.1,0.1,j",
        "1,0,25,nan,0,25,31,0.1,0.1,1000",
        "1,0,-25,25,0,-25,31,0.1,0.1,1000",
        "1,0,inf,25,0,inf,31,0.1,0.1,1000",
        "1,0,25,25,0,25,31,0.1,-inf,1000",
        "1,0,25,25,0,25,31,0.1,0.1,10\0",
        "1,0,25,25.5,0,25,31,0.1,0.1,1000",
        "1,0,,25,0,,31,0.1,0.1,1000",
    ]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), BAD_ROWS), min_size=1, max_size=5))
def test_bad_rows_change_nothing(tmp_path_factory: pytest.TempPathFactory, bad: list[tuple[int, str]]) -> None:
    """Whatever bad rows are added anywhere, every good row keeps its values and the hit stays where it was."""
    text = csv()
    for line, row in bad:
        text = after(line, row)(text)
    runs = logs.read([tree(tmp_path_factory.mktemp("bad"), text)], use_cache=False)
    assert judged(runs).loc["damaged", "steps"] == HIT
    good = {
        name: part[part[LOSS].notna() & part["believed"]]
        for name, part in runs.evals.groupby("submission", observed=True)
    }
    for column in ("step", "time", LOSS):
        assert good["damaged"][column].tolist() == good["sound"][column].tolist()
    assert len(runs.oddities)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 40), st.binary(max_size=20)), min_size=1, max_size=6))
def test_no_damage_crashes(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]) -> None:
    """Bytes cut out and put in anywhere: the sound trial keeps its hit, and a false hit would need sound rows."""
    content = csv().encode()
    for place, length, put in edits:
        content = content[:place] + put + content[place + length :]
    runs = logs.read([tree(tmp_path_factory.mktemp("fuzz"), content)], use_cache=False)
    judged(runs)
    believed = runs.evals[runs.evals["believed"]]
    for _, part in believed.groupby("trial_id"):
        assert (np.diff(part["step"]) > 0).all()
        assert (np.diff(part["time"]) >= 0).all()
        assert (part["time"] >= 0).all()
    assert not np.isinf(runs.evals[LOSS]).any()
