"""The examples of preparing data run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name):
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_pages_runs():
    said = run("prepare_web.py")
    assert "40 pages, 30 kept by the steps" in said
    assert "'near duplicate': 1" in said
    assert "manifest.json report.html report.json tokenizer.json train.bin val.bin" in said


@pytest.mark.slow
def test_the_example_of_chinese_runs():
    said = run("prepare_chinese.py")
    assert "60 of 60 sentences kept" in said
    assert "父亲" in said.split()
    assert "[UNK]" not in said


@pytest.mark.slow
def test_the_example_of_mixing_runs():
    said = run("pack_and_mix.py")
    packed, mixed = said.splitlines()[0], said.splitlines()[-1]
    assert float(packed.split()[-2].rstrip("%")) > 95
    total = int(mixed.split()[3])
    assert f"'apple': {round(total * 3 / 4)}" in mixed


@pytest.mark.slow
def test_the_guides_code_prints_what_it_says(capsys):
    guide = (EXAMPLES.parent / "docs" / "guides" / "prepare.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.rsplit("# ", 1)[1].strip()
