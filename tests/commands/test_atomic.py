"""Files and folders are whole at every moment, and a failure leaves the old ones."""

from __future__ import annotations

import os

import pytest

from commands import atomic


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "a" / "folder"
    atomic.write_folder(folder, {"one.txt": "1", "deep/two.txt": "2"})
    atomic.write_folder(folder, {"three.txt": "3"})
    assert content(tmp_path) == {"a/folder/three.txt": "3"}


@pytest.mark.parametrize("failing", [".tmp", ".old"])
def test_a_failure_leaves_the_old_folder(tmp_path, monkeypatch, failing):
    folder = tmp_path / "folder"
    atomic.write_folder(folder, {"one.txt": "1"})
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(failing) or str(target).endswith(failing):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_folder(folder, {"two.txt": "2"})
    assert content(tmp_path) == {"folder/one.txt": "1"}


def test_leftovers_of_killed_processes_go(tmp_path):
    (tmp_path / ".table.csv.123.tmp").write_text("half")
    atomic.write_json(tmp_path / "table.json", {"a": 1})
    atomic.remove_leftovers(tmp_path)
    assert content(tmp_path) == {"table.json": '{\n  "a": 1\n}'}


def test_names_that_the_locale_could_not_read_are_written(tmp_path):
    """Python reads them byte by byte, as surrogates, which UTF-8 refuses."""
    name = "Versuch_\u00fc".encode().decode("ascii", "surrogateescape")
    atomic.write_text(tmp_path / "a.txt", name)
    atomic.write_folder(tmp_path / "folder", {"b.txt": name, "c.txt": "\udcff \ud800"})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Versuch_\u00fc"
    assert (tmp_path / "folder/b.txt").read_text(encoding="utf-8") == "Versuch_\u00fc"
    (tmp_path / "folder/c.txt").read_text(encoding="utf-8")
