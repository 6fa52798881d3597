"""The zoo of other people's models, on those that need no package."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import zoo
from commands.errors import UserError


def test_the_table_of_models_that_need_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo.md"
    assert zoo.main(["--models=U-Net,TransformerEncoder,GRU", "--steps=5", f"--out={out}"]) == 0
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
    monkeypatch.setitem(zoo.sys.modules, "timm", None)
    assert zoo.main(["--models=ResNet (timm)", "--steps=0"]) == 0
    assert "ResNet (timm): skipped, no package timm" in capsys.readouterr().out


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="'VGG' is none of GPT-2, "):
        zoo.main(["--models=VGG"])
