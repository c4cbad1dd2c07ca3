"""The stage of documents: recipes, steps, workers, interruptions, and what `prepare` makes of it."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from fastlm.data import PrepareConfig, load_manifest, load_tokens, prepare
from fastlm.data.pipeline import Job, Recipe, StepSpec, load_recipe, make_shards, read_shard
from fastlm.data.pipeline.local import LocalExecutor
from fastlm.data.sources import SourceOptions, find
from fastlm.errors import ConfigError, ConfigFileError, DataError

# A module of steps as a user has one, put where workers find it too.
STEPS = """
import os, time
from fastlm.data.document import Dropped

def shout(mark="!"):
    return lambda document: document._replace(text=document.text.upper() + mark)

def longer(chars):
    def step(document):
        return document if len(document.text) > chars else Dropped("short")
    return step

def fail_at(row):
    def step(document):
        if document.row == row:
            raise KeyError("no such thing")
        return document
    return step

def exit_at(row):
    def step(document):
        if document.row == row:
            raise SystemExit(0)
        return document
    return step

def gives(what):
    return lambda document: document._replace(text=5) if what == "text" else {"int": 5, "none": None}[what]

def die_at(row, once=""):
    def step(document):
        if document.row == row and not (once and os.path.exists(once)):
            if once:
                open(once, "w").close()
            os.kill(os.getpid(), 9)
        return document
    return step

def slow(seconds):
    def step(document):
        time.sleep(seconds)
        return document
    return step
"""
WORDS = ["the", "cat", "sat", "on", "a", "mat", "北京", "欢迎", "naïve", "Größe"]


@pytest.fixture
def steps(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    name = f"own_steps_{os.getpid()}_{hashlib.md5(str(tmp_path).encode()).hexdigest()[:6]}"
    (folder / f"{name}.py").write_text(STEPS)
    monkeypatch.syspath_prepend(str(folder))
    return name


def rows(count, seed=0, words=30):
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randrange(words))), "n": index} for index in range(count)]


def write_corpus(folder):
    """Files of every way in which units are cut, two of them of one name; returns the texts in order."""
    folder.mkdir()
    texts = []
    for index, name in enumerate(["a/part.jsonl", "b/part.jsonl", "c/part.jsonl.gz", "d.txt"]):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        made = rows(120, index)
        texts += [row["text"] for row in made if row["text"]]
        if path.suffix == ".txt":
            path.write_text("\n".join(row["text"] for row in made), encoding="utf-8")
        else:
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return texts


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def small_units(monkeypatch):
    """Units of a few rows, so that small corpora have many."""
    monkeypatch.setattr("fastlm.data.sources.units.UNIT_BYTES", 2000)


GLOBS = ("*.jsonl", "*.jsonl.gz", "*.txt")


def files_of(folder):
    return find([folder], GLOBS)


def make(folder, out, specs, workers=1, **options):
    job = Job(tuple(specs), SourceOptions(document_separator=r"\n", **options), out)
    return make_shards(job, files_of(folder), LocalExecutor(workers), lambda done, total: None)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_documents_pass_all_steps_in_order_whatever_the_workers(workers, steps, corpus, small_units, tmp_path):
    specs = [StepSpec(f"{steps}:longer", {"chars": 60}), StepSpec(f"{steps}:shout", {"mark": "?"})]
    shards, counts, sources, _ = make(tmp_path / "corpus", tmp_path / "out", specs, workers)
    want = [text.upper() + "?" for text in corpus if len(text) > 60]
    assert [document.text for shard in shards for document in read_shard(shard.path)] == want
    assert len(shards) > 10
    first, second = counts["steps"]
    assert (first["name"], second["name"]) == (f"{steps}:longer", f"{steps}:shout")
    read = counts["documents_read"]
    assert read == first["documents"] == second["documents"] + first["dropped"]["short"]
    assert (second["changed"], counts["documents_cleaned"], counts["empty"]) == (len(want), len(want), 0)
    assert counts["bytes_cleaned"] == sum(len(text.encode()) for text in want)
    assert [(Path(entry["path"]).name, entry["sha256"]) for entry in sources] == [
        (file.path.name, hashlib.sha256(file.path.read_bytes()).hexdigest()) for file in files_of(tmp_path / "corpus")
    ]
    if workers > 1:
        make(tmp_path / "corpus", tmp_path / "again", specs)
        assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_files_of_one_name_stay_apart(corpus, tmp_path):
    shards, *_ = make(tmp_path / "corpus", tmp_path / "out", [])
    seen = {(document.source, document.row) for shard in shards for document in read_shard(shard.path)}
    assert len(seen) == len(corpus)
    assert len({source for source, _ in seen}) == 4


def test_shards_that_are_there_are_left_and_others_made(steps, corpus, small_units, tmp_path):
    out, specs = tmp_path / "out", [StepSpec(f"{steps}:shout", {})]
    shards, counts, *_ = make(tmp_path / "corpus", out, specs)
    before = contents(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    shards[3].path.unlink()
    shards[5].record_path.write_text("{")
    with open(shards[7].path, "ab") as file:
        file.write(b"x")
    assert make(tmp_path / "corpus", out, specs, 2)[1] == counts
    assert contents(out) == before
    remade = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert remade == {path.name for index in (3, 5, 7) for path in (shards[index].path, shards[index].record_path)}
    # Other steps, another file: nothing of the old stays.
    other = [StepSpec(f"{steps}:shout", {"mark": "?"})]
    (tmp_path / "corpus" / "b" / "part.jsonl").write_text('{"text": "one"}\n')
    make(tmp_path / "corpus", out, other)
    make(tmp_path / "corpus", tmp_path / "fresh", other)
    assert contents(out) == contents(tmp_path / "fresh")


def test_the_first_bad_row_in_order_is_the_one_named(corpus, small_units, tmp_path):
    path = tmp_path / "corpus" / "b" / "part.jsonl"
    lines = path.read_bytes().splitlines()
    lines[70], lines[80] = b"{", b"["
    path.write_bytes(b"\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(DataError, match=rf"^{path}: row 71: is not JSON .*; give --on-error skip"):
            make(tmp_path / "corpus", tmp_path / f"out{workers}", [], workers)
    job = Job((), SourceOptions(document_separator=r"\n"), tmp_path / "skipped", skip=True)
    _, counts, *_ = make_shards(job, files_of(tmp_path / "corpus"), LocalExecutor(1), lambda *_: None)
    assert counts["bad"] == {"malformed": 2}
    assert [line.split(": is")[0] for line in counts["bad_listed"]] == [f"{path}: row 71", f"{path}: row 81"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_that_fails_is_named_with_its_document(workers, steps, corpus, tmp_path):
    message = rf"a/part.jsonl: row 4: step {steps}:fail_at failed: KeyError: 'no such thing'"
    with pytest.raises(DataError, match=message):
        make(tmp_path / "corpus", tmp_path / "out", [StepSpec(f"{steps}:fail_at", {"row": 4})], workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_that_ends_its_process_is_named_as_any_that_fails(workers, steps, corpus, tmp_path):
    with pytest.raises(DataError, match=rf"a/part.jsonl: row 4: step {steps}:exit_at failed: SystemExit: 0; give"):
        make(tmp_path / "corpus", tmp_path / "out", [StepSpec(f"{steps}:exit_at", {"row": 4})], workers)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("int", "int, expected Document or Dropped"),
        ("none", "NoneType, expected Document or Dropped"),
        ("text", "a Document whose text is int, expected str"),
    ],
)
def test_a_step_that_returns_something_else_ends_the_run(what, message, skip, steps, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    job = Job((StepSpec(f"{steps}:gives", {"what": what}),), SourceOptions(), tmp_path / "out", skip)
    with pytest.raises(DataError, match=rf"^{tmp_path / 'a.jsonl'}: row 1: step {steps}:gives returned {message}$"):
        make_shards(job, find([tmp_path / "a.jsonl"], []), LocalExecutor(1), lambda *_: None)


def test_a_worker_that_is_killed_is_replaced_once(steps, corpus, small_units, tmp_path):
    once = StepSpec(f"{steps}:die_at", {"row": 40, "once": str(tmp_path / "died")})
    shards, *_ = make(tmp_path / "corpus", tmp_path / "out", [once], 2)
    assert (tmp_path / "died").exists()
    assert [document.text for shard in shards for document in read_shard(shard.path)] == corpus
    always = StepSpec(f"{steps}:die_at", {"row": 40})
    with pytest.raises(
        DataError, match=r"a worker was lost twice \(killed by SIGKILL\) at .*a/part.jsonl from row \d+"
    ):
        make(tmp_path / "corpus", tmp_path / "out2", [always], 2)


CHILD = """
import sys
from pathlib import Path
import fastlm.data.sources.units as units
from fastlm.cli import main
units.UNIT_BYTES = 2000
sys.path.insert(0, sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_anywhere_and_run_again_gives_the_bytes_of_one_run(kills, steps, corpus, tmp_path):
    modules = str(tmp_path / "modules")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[[step]]\nname = "{steps}:longer"\nchars = 20\n[[step]]\nname = "{steps}:slow"\nseconds = 0.002\n'
    )
    arguments = ["prepare", str(tmp_path / "corpus"), "--glob", "*.jsonl", "*.gz", "*.txt"]
    arguments += ["--document-separator", r"\n", "--recipe", str(recipe), "--vocab-size", "300"]

    def start(out, workers):
        command = [sys.executable, "-c", CHILD, modules, *arguments, "--out", str(out), "--workers", str(workers)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole" / "data", 1).wait() == 0
    rng = random.Random(kills)
    made = tmp_path / "killed" / "data" / "documents"
    for _ in range(kills):
        process = start(tmp_path / "killed" / "data", 2)
        target = len(list(made.glob("*.json"))) + rng.randrange(0, 20 // kills)
        while process.poll() is None and len(list(made.glob("*.json"))) <= target:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.02)
        assert process.poll() is None
        process.kill()
        process.wait()
    assert start(tmp_path / "killed" / "data", 2).wait() == 0
    assert contents(tmp_path / "killed" / "data") == contents(tmp_path / "whole" / "data")


@pytest.mark.slow
def test_killed_in_any_stage_with_any_workers_gives_the_bytes_of_one_run(corpus, tmp_path):
    # Steps, signatures, near duplicates, repeated lines, training and tokens: each is where some of the kills fall.
    lines = [json.dumps({"text": " ".join(f"word{n % (k + 7)}" for n in range(300))}) for k in range(1500)]
    (tmp_path / "corpus" / "more.jsonl").write_text("\n".join(lines + lines[:500]) + "\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[step]]\nname = "whitespace"\n[[step]]\nname = "gopher_repetition"\n[exact]\n[near]\n[lines]\nmost = 3\n'
    )
    arguments = ["prepare", str(tmp_path / "corpus"), "--glob", "*.jsonl", "*.gz", "*.txt"]
    arguments += ["--document-separator", r"\n", "--recipe", str(recipe), "--vocab-size", "300"]
    child = CHILD.replace("2000", "50_000")

    def start(name, workers):
        flags = ["--out", str(tmp_path / name / "data"), "--workers", str(workers)]
        return subprocess.Popen([sys.executable, "-c", child, ".", *arguments, *flags], stdout=subprocess.DEVNULL)

    times = []
    for workers in (1, 2, 3):
        begun = time.monotonic()
        assert start(f"whole{workers}", workers).wait() == 0
        times.append(time.monotonic() - begun)
    whole = contents(tmp_path / "whole1" / "data")
    assert contents(tmp_path / "whole2" / "data") == contents(tmp_path / "whole3" / "data") == whole
    rng = random.Random(0)
    data = tmp_path / "killed" / "data"
    stages = set()
    for part in range(12):
        process = start("killed", 1 + part % 3)
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(times) * (part + rng.random()) / 12)
        process.kill()
        process.wait()
        if (data / "manifest.json").exists():  # the last file: all is there
            break
        stages.add(tuple(sorted({path.name.split(".", 1)[-1] for path in data.rglob("*")})))
    else:
        assert start("killed", 3).wait() == 0
    assert {path.name: path.read_bytes() for path in data.glob("[!.]*")} == whole
    assert stages  # at least one kill came before the end; which stages they meet depends on how busy the machine is


def test_workers_end_with_their_parent(steps, corpus, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[step]]\nname = "{steps}:slow"\nseconds = 600\n')
    arguments = ["prepare", str(tmp_path / "corpus" / "a"), "--glob", "*.jsonl", "--recipe", str(recipe)]
    arguments += ["--out", str(tmp_path / "out"), "--workers", "2"]
    psutil = pytest.importorskip("psutil")
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "modules"), *arguments]) as process:
        while len(children := psutil.Process(process.pid).children()) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_recipes_say_what_is_wrong(steps, tmp_path):
    path = tmp_path / "r.toml"
    for text, message in [
        ("[[step]]\n", "step 1: name is None, expected the name of a step"),
        ("[[step]]\nname = 3\n", "step 1: name is 3"),
        ("[[steps]]\nname = 'a'\n", "unknown key 'steps'"),
        ("step = 5\n", r"step is 5, expected \[\[step\]\] tables"),
        ("[[step]]\nname = 'a'\nenabled = 1\n", "step 1: enabled is 1, expected true or false"),
        ("[[step]\n", "not valid TOML"),
        ("[[step]]\nname = 'no_such_module:x'\n", r"step 1: name is 'no_such_module:x', expected module:function"),
        (f"[[step]]\nname = '{steps}:none'\n", "expected module:function"),
        (f"[[step]]\nname = '{steps}:longer'\nwords = 3\n", "unexpected keyword argument 'words'"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigFileError, match=rf"^{path}: .*{message}"):
            PrepareConfig(path, tmp_path / "out", recipe=str(path)).steps()
    with pytest.raises(ConfigFileError, match=r"nope: no such recipe; expected a file, or one of "):
        load_recipe("nope")
    with pytest.raises(ConfigError, match=r"without is 'b', expected steps of the recipe: a, c"):
        Recipe("r", (StepSpec("a", {}), StepSpec("c", {}))).without(["b"])
    path.write_text("[[step]]\nname = 'a'\n[[step]]\nname = 'b'\nenabled = false\n[[step]]\nname = 'a'\nk = 2\n")
    assert load_recipe(str(path)).steps == (StepSpec("a", {}), StepSpec("a", {"k": 2}))
    assert load_recipe(str(path)).without(["a"]).steps == ()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_module_beside_the_recipe_is_found_first(workers, small_units, tmp_path, monkeypatch):
    name = f"beside_{os.getpid()}_{workers}"
    for folder, mark in (("recipes", "!"), ("elsewhere", "?")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(STEPS.replace('mark="!"', f"mark={mark!r}"))
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    path = list(sys.path)
    (tmp_path / "recipes" / "r.toml").write_text(f"[[step]]\nname = '{name}:shout'\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    monkeypatch.chdir(tmp_path)
    config = PrepareConfig(
        "a.jsonl", "out", recipe="recipes/r.toml", workers=workers, keep_documents=True, tokenizer="characters"
    )
    prepare(config)
    made = [found.text for file in sorted((tmp_path / "out" / "documents").glob("*.zst")) for found in read_shard(file)]
    assert made
    assert all(text.endswith("!") for text in made)
    assert sys.path == path


def test_a_module_that_cannot_be_had_is_said_with_where_it_was_looked_for(tmp_path):
    recipe = tmp_path / "r.toml"
    (tmp_path / f"broken_{os.getpid()}.py").write_text("def f(:")
    (tmp_path / f"leaving_{os.getpid()}.py").write_text("raise SystemExit(3)")
    (tmp_path / "json.py").write_text("")
    for name, reason in [
        ("no_such_module", "No module named 'no_such_module'"),
        (f"broken_{os.getpid()}", "SyntaxError: invalid syntax"),
        (f"leaving_{os.getpid()}", "SystemExit: 3"),
        ("json", "json.py has the name of a module that is loaded already, "),
    ]:
        recipe.write_text(f"[[step]]\nname = '{name}:loads'\n")
        with pytest.raises(
            ConfigFileError, match=rf"name is '{name}:loads', .*{reason}.*; looked in {tmp_path}, then on"
        ):
            PrepareConfig(tmp_path, tmp_path / "out", recipe=str(recipe)).steps()


def test_prepare_on_documents_gives_the_bytes_of_plain_text(corpus, tmp_path):
    # The same texts, each once, as a file of their own each, in the same order.
    plain = tmp_path / "plain"
    plain.mkdir()
    for index, text in enumerate(dict.fromkeys(corpus)):
        (plain / f"{index:04}.txt").write_bytes(text.encode())
    options = {"vocab_size": 400, "split": "documents", "val_fraction": 0.1}
    prepare(PrepareConfig(plain, tmp_path / "one", **options))
    options |= {"deduplicate": "exact", "glob": GLOBS, "document_separator": r"\n"}
    manifest = prepare(PrepareConfig(tmp_path / "corpus", tmp_path / "two", **options))
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "manifest.json", "report.html", "report.json", "tokenizer.json", "train.bin", "val.bin",
    ]  # fmt: skip
    assert manifest.to_json() == load_manifest(tmp_path / "two").to_json()
    assert [Path(entry["path"]).name for entry in manifest.sources] == [
        "part.jsonl",
        "part.jsonl",
        "part.jsonl.gz",
        "d.txt",
    ]
    assert manifest.preparation["documents"]["documents_cleaned"] == len(corpus)


FULL = """
import resource, sys
from fastlm.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_takes_no_more_is_one_line(workers, tmp_path):
    rng = random.Random(0)
    texts = [{"text": " ".join(str(rng.random()) for _ in range(40))} for _ in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    command = [sys.executable, "-c", FULL, "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--workers", workers], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("fastlm prepare: [Errno 27] File too large: '")
    assert "documents-00000.jsonl.zst'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_recipes_that_come_along_can_be_made():
    for name in ("web", "books"):
        recipe = load_recipe(name)
        recipe.check()
        assert recipe.steps
        assert recipe.duplicates.exact


def test_duplicates_are_dropped_whatever_the_workers_and_pairs_written(small_units, tmp_path):
    rng = random.Random(0)
    texts = [" ".join(f"word{rng.randrange(10_000)}" for _ in range(200)) for _ in range(30)]
    near = [text + " and another end" for text in texts[:7]]
    lines = ["All rights reserved.\n" + text for text in [*texts, *texts[:5], *near]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    recipe = tmp_path / "r.toml"
    recipe.write_text("[exact]\n[near]\nthreshold = 0.7\n[lines]\nmost = 3\n")
    options = {"recipe": str(recipe), "vocab_size": 300, "val_fraction": 0.0, "split": "documents"}
    for name, workers in (("one", 1), ("two", 2)):
        config = PrepareConfig(
            tmp_path / "a.jsonl", tmp_path / name / "data", workers=workers,
            duplicate_pairs=tmp_path / f"{name}.jsonl", **options,
        )  # fmt: skip
        manifest = prepare(config)
    assert contents(tmp_path / "one" / "data") == contents(tmp_path / "two" / "data")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    counts = manifest.preparation["documents"]["duplicates"]
    assert counts == {"exact duplicate": 5, "near duplicate": 7, "repeated lines": 1}
    assert manifest.splits["train"]["documents"] == 30
    pairs = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert sorted((pair["dropped"], pair["kept"]) for pair in pairs) == [
        *((30 + index, index) for index in range(5)),
        *((35 + index, index) for index in range(7)),
    ]
    # What is left of each is the text without the repeated line, but for the first that has it.
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "one" / "data" / "tokenizer.json"))
    ids = load_tokens(tmp_path / "one" / "data", "train")
    ends = np.flatnonzero(ids == manifest.eot_id)
    got = [theirs.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert got == ["All rights reserved.\n" + texts[0], *texts[1:]]


def test_documents_with_text_of_an_evaluation_set_are_dropped(tmp_path):
    questions = [" ".join(f"word{index}" for index in range(start, start + 20)) for start in (0, 50)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    rows = [{"text": f"Before. {questions[0]} after."}, {"text": "Something else, of no interest at all."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = StepSpec("contamination", {"files": [str(tmp_path / "eval.jsonl")], "text_column": "question"})
    job = Job((step,), SourceOptions(), tmp_path / "out")
    _, counts, *_ = make_shards(job, find([tmp_path / "a.jsonl"], []), LocalExecutor(1), lambda *_: None)
    assert counts["steps"][0]["dropped"] == {"contaminated": 1}
    assert counts["documents_cleaned"] == 1


@pytest.mark.slow
def test_memory_stays_below_its_bound_whatever_the_corpus(tmp_path):
    # 1.2 GB with one line of 20 MB, on two workers: the sum of all their resident memory, looked at 20 times a second.
    psutil = pytest.importorskip("psutil")
    rng = random.Random(0)
    block = "".join(json.dumps(row) + "\n" for row in rows(4000, words=600)).encode()
    with open(tmp_path / "a.jsonl", "wb") as file:
        while file.tell() < 1.2e9:
            file.write(block)
        file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=3_500_000))}).encode() + b"\n")
    command = [sys.executable, "-m", "fastlm.cli", "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    command += ["--workers", "2", "--tokenizer", "characters", "--deduplicate", "none"]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
            peak = max(peak, sum(_resident(member) for member in family))
            time.sleep(0.05)
    assert process.returncode == 0
    assert peak < 1 << 30


def _resident(process):
    import psutil

    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


@pytest.mark.slow
def test_twenty_thousand_small_files(tmp_path):
    for index in range(20_000):
        folder = tmp_path / "files" / str(index % 100)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.txt").write_text(f"file number {index} of many\n")
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[step]]\nname = "whitespace"\n')
    config = PrepareConfig(tmp_path / "files", tmp_path / "out", recipe=str(recipe), vocab_size=300, workers=2)
    manifest = prepare(config)
    assert len(manifest.sources) == manifest.preparation["documents"]["documents_cleaned"] == 20_000
    assert len({entry["path"] for entry in manifest.sources}) == 20_000
