"""Files are written whole or not at all; the nearest names end a sentence."""

import os

import pytest

from setlib.files import nearest, write_atomic


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    target = tmp_path / "file.json"
    write_atomic(target, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(
        ValueError, match=r"Cannot write .*file.json: No space left on device: free space or change the folder"
    ):
        write_atomic(target, "new")
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_files_are_readable_for_others(tmp_path):
    write_atomic(tmp_path / "folder" / "file", b"x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "folder" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_near_is_a_sentence_too():
    assert nearest("refinr", ["refiner", "seed"]) == "nearest: refiner"
    assert nearest("a", []) == "known: none"
