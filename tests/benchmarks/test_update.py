"""`python -m benchmarks.paper update`: what is run, kept and shown."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.paper.__main__ import main
from benchmarks.paper.update import cases, command, page, worker
from benchmarks.paper.update.cases import BATCHES, OPTIMIZERS, Case
from benchmarks.paper.update.network import CLASSES, SIDE, wide_resnet

WANTED = cases.cases(2.0, quick=False)


def made_up(case):
    """Seconds grow with the batch; with a limit expand runs out above 512."""
    base = {**dataclasses.asdict(case), "version": "0", "device": "made up", "took": 1.0}
    if case.memory_gb is not None and case.optimizer == "expand" and case.batch > 512:
        return {**dataclasses.asdict(case), "outcome": "out"}
    each = 1 + OPTIMIZERS.index(case.optimizer)
    seconds = {"pass": each * case.batch / 1024, "update": each * case.batch / 1024}
    return {**base, "outcome": "fits", "seconds": seconds, "peak_bytes": 1e6 * case.batch}


def test_what_is_kept_is_not_run_again(tmp_path, capsys):
    kept, ran = tmp_path / "kept.jsonl", []

    def runs(case):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(case)
        return made_up(case)

    with pytest.raises(KeyboardInterrupt):
        command.measure(WANTED, cases.book(kept), runs=runs)
    assert cases.book(kept).missing(WANTED) == WANTED[3:]
    command.measure(WANTED, cases.book(kept), runs=made_up)
    assert f"==> {len(WANTED) - 3} runs, about" in capsys.readouterr().out
    assert cases.book(kept).missing(WANTED) == []


def test_the_page_by_hand(tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    book = cases.book(kept)
    for case in WANTED:
        book.add(case, made_up(case))
    given = [f"--results={kept}", f"--output={tmp_path / 'page.md'}", "--memory_gb=2"]
    assert main(["update", *given]) == 0
    assert "==> 0 runs" in capsys.readouterr().out
    text = (tmp_path / "page.md").read_text()
    assert text == page.page(book, 2.0)
    assert "| 512 | 1.00 (1.00) | 2.00 (2.00) | 3.00 (3.00) | 4.00 (4.00) |" in text
    assert "| 512 | 0.51 | 0.51 | 0.51 | 0.51 |" in text
    assert "| 2,048 | fits | **runs out** | fits | fits |" in text
    # Another limit was not tried.
    assert "runs out" not in page.page(book, 3.0)


def test_all_batches_are_tried_with_and_without_a_limit():
    assert len(WANTED) == len(set(WANTED)) == 2 * len(BATCHES) * len(OPTIMIZERS)
    assert set(cases.cases(2.0, quick=True)) < set(WANTED)


def test_the_network_is_covered():
    from algoperf_kfac.pytorch import KFAC

    model = wide_resnet()
    assert model(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, CLASSES)
    coverage = KFAC(model, **worker.PAPER, **worker.FIELDS["reduce"]).coverage()
    assert len(coverage.layers) == 11  # the first, three of each of three blocks, the head
    assert coverage.fraction > 0.99


def test_a_process_runs_out_of_what_it_is_given():
    assert command.in_process(Case("expand", 128, 0.005)) == {
        "optimizer": "expand",
        "batch": 128,
        "memory_gb": 0.005,
        "outcome": "out",
    }


@pytest.mark.parametrize(
    ("error", "limited", "expected"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True, False),
        # oneDNN's words, where its allocation fails before torch's does; which of both, the machine decides.
        (RuntimeError("could not create a primitive"), True, True),
        (RuntimeError("could not create a primitive"), False, False),
    ],
)
def test_only_a_lack_of_memory_is_one(error, limited, expected):
    assert worker.ran_out(error, limited=limited) is expected
