"""The documents' Python runs as it stands, and prints what they say it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
# Lines of code, and what they print where that is shown.
BLOCK = re.compile(r"```python\n((?:(?!```).)*)```(?:\n\n```text\n((?:(?!```).)*)```)?", re.DOTALL)
# What stands around a fragment in a loop of the reader's own; its statistics step lies behind it.
AROUND = """
import torch
from algoperf_kfac.pytorch import KFAC, Positions

model, criterion = torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy
x, y = torch.randn(6, 4), torch.arange(6) % 3
mask, num_graphs = torch.ones(6), 2
graph_of_node = graph_of_edge = range_of_graphs = torch.arange(6) // 3
optimizer = KFAC(model, FISHERinitial_statistics=1)
"""
STEP = """
with optimizer.capture():
    criterion(model(x), y).backward()
optimizer.step()
"""


def blocks() -> list[tuple[str, str, str]]:
    found = []
    for document in ("README.md", "docs/library.md", "docs/architecture.md"):
        for number, (code, printed) in enumerate(BLOCK.findall((CHECKOUT / document).read_text()), 1):
            found.append((f"{document}-{number}", code, printed))
    return found


@pytest.mark.parametrize(
    ("code", "printed"), [block[1:] for block in blocks()], ids=[block[0] for block in blocks()]
)
def test_it_runs(
    code: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where the frameworks are imported already; test_examples.py runs the README's in its own."""
    if not code.startswith(("import", "from")):
        samples = "backward_fisher" in code
        around = AROUND.replace("FISHER", "fisher='mc', " if samples else "")
        code = around + ("" if samples else STEP) + code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<document>", "exec"), {"__name__": "__main__"})
    if printed:
        assert capsys.readouterr().out == printed


def test_blocks_of_both_frameworks_are_found() -> None:
    sources = [code for _, code, _ in blocks()]
    assert len(sources) >= 8
    assert any("algoperf_kfac.jax" in code for code in sources)
