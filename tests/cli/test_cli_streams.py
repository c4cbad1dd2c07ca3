"""The commands where standard input and output are not what a terminal gives: full, closed, of a narrow encoding."""

import io
import sys
from pathlib import Path

import pytest

from fastlm.cli import main

FULL = Path("/dev/full")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "té.txt"
    path.write_text("the cat sat on the mat. " * 400, encoding="utf-8")
    return str(path)


def prepare(source, out):
    return ["prepare", source, "--out", str(out), "--vocab-size", "300"]


@pytest.mark.skipif(not FULL.exists(), reason=f"{FULL} is Linux's")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["prepare"]])
def test_full_output_is_one_line_on_standard_error(source, tmp_path, monkeypatch, capsys, arguments):
    if arguments == ["prepare"]:
        arguments = prepare(source, tmp_path / "out")
    with open(FULL, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "No space left on device" in error or arguments == []
    assert error.count("\n") <= 1


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_does_not_keep_a_verb_from_working(source, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    assert main(prepare(source, tmp_path / "out")) == 0
    getattr(sys, name).close()
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_cannot_hold_a_path_replaces_what_it_lacks(source, tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(prepare(source, tmp_path / "世\udcff")) == 0  # the second as the system gives a byte that is no UTF-8
    assert "token ids" in stream.buffer.getvalue().decode(encoding)
