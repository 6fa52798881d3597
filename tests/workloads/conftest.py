"""Fixtures of the runner's tests."""

from __future__ import annotations

import pytest

from tests.workloads.helpers import shrink


@pytest.fixture
def small(monkeypatch):
    """Evaluates bible_lm on few windows, every two steps."""
    shrink(monkeypatch.setattr)
