"""What `prepare` writes into its report: which documents it shows, of what, and the numbers beside them."""

import json

import pytest

from fastlm.data import PrepareConfig, prepare

FILLER = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture
def make(tmp_path):
    """Prepares texts with a recipe; returns the manifest, and report.json read."""

    def run(texts, recipe="", **options):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if recipe:
            (tmp_path / "r.toml").write_text(recipe)
            options["recipe"] = str(tmp_path / "r.toml")
        options = {"vocab_size": 300, "workers": 1, "overwrite": True} | options
        manifest = prepare(PrepareConfig(tmp_path / "a.jsonl", tmp_path / "out", **options))
        return manifest, json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def test_no_example_of_any_step_shows_what_was_masked(make, tmp_path):
    pytest.importorskip("phonenumbers")
    # The second is changed before it is masked, the third dropped before, and the fourth's is where examples are cut.
    secrets = ["winston@a.example.org", "julia@fiction.example.com", "+1 202-456-1111", "obrien@miniluv.example.net"]
    texts = [
        f"Write to {secrets[0]} at once. {FILLER}",
        f"Write to {secrets[1]} at once. {FILLER}  ",
        f"Call {secrets[2]}.",
        FILLER * 5 + f"..... {secrets[3]} {secrets[0]} {FILLER}",
    ]
    steps = "".join(f'[[step]]\nname = "{name}"\n' for name in ("whitespace", "length", "personal_data"))
    _, report = make(texts, steps.replace('"length"\n', '"length"\nmin_words = 5\n'))
    assert report["masked"] == {"email": 4}
    shown = [len(step["examples"]) for step in report["steps"]]
    assert shown == [1, 1, 3]
    for name in ("report.html", "report.json"):
        page = (tmp_path / "out" / name).read_text()
        assert "[EMAIL]" in page
        assert "[PHONE]" in page
        for secret in secrets:
            for part in (secret, secret.split("@")[0], secret[-8:]):
                assert part not in page, (name, part)


def test_an_example_shows_the_place_that_a_step_changed(make):
    pytest.importorskip("phonenumbers")
    head = FILLER * 40
    steps = '[[step]]\nname = "whitespace"\n[[step]]\nname = "personal_data"\n'
    texts = [f"{head}\nTo be   \ncontinued. {FILLER}", f"{head}\nAsk winston@a.example.org of it. {FILLER}"]
    _, report = make([*texts, "To be  \n."], steps)
    blanks, masked = ({example["row"]: example for example in step["examples"]} for step in report["steps"])
    assert "To be   \ncontinued" in blanks[1]["before"]
    assert "To be\ncontinued" in blanks[1]["after"]
    assert blanks[1]["before"].startswith("\u2026")
    assert (blanks[3]["before"], blanks[3]["after"]) == ("To be  \n.", "To be\n.")
    assert "thirteen.\nAsk [EMAIL] of it. It was" in masked[2]["after"]
    assert all(len(example[key]) <= 401 for example in (*blanks.values(), masked[2]) for key in ("before", "after"))
