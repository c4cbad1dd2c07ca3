"""The guide names every step, says which are defaults, and its example runs."""

import re
from pathlib import Path

from fastlm.data.clean import DEFAULT_STEPS, steps

GUIDE = (Path(__file__).parents[3] / "docs" / "cleaning.md").read_text(encoding="utf-8")


def test_the_guide_lists_every_step_and_the_defaults():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|[^|]*\| (yes|) *\|$", GUIDE, re.M)
    listed = {name: default for names, default in rows for name in re.findall(r"\w+", names)}
    assert set(listed) == {info.name for info in steps()}
    assert {name for name, default in listed.items() if default} == set(DEFAULT_STEPS)


def test_the_guides_example_runs(capsys):
    [example] = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    exec(example, {})
    first = re.search(r"# (Dropped\(.*\))", example)
    assert capsys.readouterr().out.splitlines()[0] == first[1]
