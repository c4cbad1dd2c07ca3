"""The examples of preparing data run as they stand."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "prepare_web.py"


def test_the_example_of_pages_runs():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 pages, 30 kept by the steps" in done.stdout
    assert "'near duplicate': 1" in done.stdout
    assert "manifest.json report.html report.json tokenizer.json train.bin val.bin" in done.stdout
