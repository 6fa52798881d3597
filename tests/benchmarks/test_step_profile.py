"""The profile of a step: every phase it times is there to be timed, and sections are replaced by their label."""

from __future__ import annotations

from benchmarks.step_profile import PHASES, replaced


def test_what_is_timed_is_there() -> None:
    assert all(callable(getattr(owner, name)) for timed in PHASES.values() for owner, name in timed)


def test_a_section_takes_the_place_of_that_of_its_label() -> None:
    page = replaced("# Page\n", "now", ["one"])
    assert "one" in page
    again = replaced(replaced(page, "before", ["two"]), "now", ["three"])
    assert "one" not in again
    assert again.index("three") >= 0 < again.index("two")
