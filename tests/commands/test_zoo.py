"""The zoo of other people's models and the evidence for defaults, on models that need no package."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import defaults
from benchmarks.zoo import plain
from benchmarks.zoo.__main__ import main
from commands.errors import UserError


def test_the_table_of_models_that_need_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo.md"
    assert main(["--models=U-Net,TransformerEncoder,GRU", "--steps=5", f"--out={out}"]) == 0
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == ["U-Net", "TransformerEncoder", "GRU"]
    for row in rows:
        covered, core, error = (float(cell) for cell in row[2:5])
        assert covered > 0.98
        assert core == 1
        assert error < 1e-5
        assert all(float(loss) > 0 for loss in row[6:9])
    assert "GRU  32,138" in capsys.readouterr().out


def test_a_model_without_its_package_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["--models=ResNet (timm)", "--steps=0"]) == 0
    assert "ResNet (timm): skipped, no package timm" in capsys.readouterr().out


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="'VGG' is none of GPT-2, "):
        main(["--models=VGG"])


def test_settings_are_compared_with_nadamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the best rate, means over seeds; NadamW's loss is 4 on one model and 1 on the other."""

    def train(
        exhibit: Any, name: str, rate: float, seed: int, steps: int, options: Any
    ) -> tuple[float, list[float]]:
        base = 4.0 if exhibit.build is plain.UNet else 1.0
        share = {"nadamw": 1.0, "expand": 0.5, "reduce": base}[name] * options.get("power", 1.0)
        return base * share * (1 + abs(math.log10(rate) + 2)) * (0.5 + seed), []

    monkeypatch.setattr(defaults, "train", train)
    out = tmp_path / "defaults.md"
    options = ["--models=U-Net,TransformerEncoder", "--settings=1e-4:1,1e-2:0.5", f"--out={out}"]
    assert defaults.main(options) == 0
    table = [line.strip("|").split("|") for line in out.read_text().splitlines()]
    head, _, *rows = [[cell.strip() for cell in cells] for cells in table]
    assert head[2:] == ["expand 1e-4:1", "expand 1e-2:0.5", "reduce 1e-4:1", "reduce 1e-2:0.5"]
    assert rows[0] == ["U-Net", "4", "2", "1", "16", "8"]
    assert rows[1] == ["TransformerEncoder", "1", "0.5", "0.25", "1", "0.5"]
    assert rows[2][2:] == ["2", "2", "0", "1"]
    assert rows[3][2:] == ["0.50", "0.25", "2.00", "1.00"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--settings=1e-2", "'1e-2' is not damping:power"),
        ("--settings=1e-2:2", "power=2.0"),
        ("--models=VGG", "'VGG' is none of GPT-2, "),
    ],
)
def test_bad_settings(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        defaults.main([argument])
