"""What loading takes of memory, measured by load_memory.py in a process that nothing else has filled."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_in_a_process_of_its_own():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        Path(__file__).with_name("load_memory.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
