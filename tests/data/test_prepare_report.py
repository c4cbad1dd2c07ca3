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


def test_what_is_left_is_counted_after_duplicates(make, tmp_path):
    texts = [*[FILLER] * 9, "Short.", "Ads.", "Ads. ", "  "]
    recipe = '[[step]]\nname = "length"\nmax_words = 20\n[exact]\n[lines]\nmost = 1\nkeep = "none"\n'
    texts += [f"{FILLER} {FILLER}", "Another text.\nAds."]
    manifest, report = make(texts, recipe, split="documents", val_fraction=0)
    # One is blank and one has 28 words; of equal ones eight go; three are nothing but a line that occurs too often.
    assert report["totals"] == {"read": 15, "dropped": 2, "duplicates": 8, "emptied": 3, "left": 2}
    assert report["totals"]["left"] == report["splits"]["train"]["documents"] == manifest.preparation["documents_left"]
    assert sum(report["cleaned"]["lengths"].values()) == 13
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>2</b><span>documents left</span>" in page
    assert "<b>13.3 %</b><span>of documents left</span>" in page
    assert "kept" not in page


@pytest.mark.parametrize(
    ("recipe", "flag", "left"),
    [
        ("", "recipe", 4), ("", "none", 4), ("", "exact", 3), ("", "near", 2),
        ("[exact]\n[near]\n", "recipe", 2), ("[exact]\n[near]\n", "none", 4), ("[exact]\n[near]\n", "exact", 3),
        ("[near]\nthreshold = 0.99\n", "near", 3), ("[exact]\n", "near", 2),
    ],
)  # fmt: skip
def test_the_flag_says_which_duplicates_are_dropped_whatever_the_recipe(make, tmp_path, recipe, flag, left):
    long = " ".join(f"word{index}" for index in range(300))
    texts = [long, long, f"{long} and five words more", "Something else."]
    pairs = tmp_path / "pairs.jsonl" if flag in ("exact", "near") else None
    manifest, report = make(texts, recipe, deduplicate=flag, split="documents", val_fraction=0, duplicate_pairs=pairs)
    assert manifest.preparation["documents_left"] == left == manifest.splits["train"]["documents"]
    assert sum(kind["documents"] for kind in report["duplicates"]) == 4 - left
    if pairs is not None:
        assert len(pairs.read_text().splitlines()) == 4 - left


def test_equal_plain_text_is_compared_as_documents_are(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(FILLER)
    config = PrepareConfig(tmp_path, tmp_path / "out", vocab_size=300, workers=1, deduplicate="exact", val_fraction=0)
    assert prepare(config).preparation["documents"]["duplicates"]["exact duplicate"] == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["left"] == 1
