"""`fastlm prepare` as a user meets it: flags, summary, exit status, one-line errors."""

import signal

import pytest

from fastlm.cli import main
from fastlm.data import PrepareConfig, Tokenizer, load_manifest, load_tokens
from fastlm.errors import ConfigError

LINE = "The quick brown fox jumps over the lazy dög.\n"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text(LINE * 60, encoding="utf-8")
    (folder / "inner" / "b.txt").write_text(LINE * 30, encoding="utf-8")
    (folder / "c.md").write_text("# " + LINE, encoding="utf-8")
    return folder


def run(*arguments):
    return main(["prepare", *map(str, arguments)])


def test_prepare_prints_a_summary_of_what_it_wrote(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(source, "--out", out, "--vocab-size", 300, "--val-fraction", 0.1) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress where there is no terminal
    manifest = load_manifest(out, verify=True)
    assert len(manifest.sources) == 2
    assert f"{manifest.vocab_size} token ids" in " ".join(captured.out.split())
    for split, entry in manifest.splits.items():
        row = next(line for line in captured.out.splitlines() if line.startswith(f"│ {split} "))
        cells = [cell.strip().replace(",", "") for cell in row.split("│")[1:-1]]
        counts = [str(entry[key]) for key in ("tokens", "documents", "bytes", "chars")]
        assert cells == [split, *counts, f"{entry['bytes'] / entry['tokens']:.3f}"]
    assert "validation: a span of each document" in captured.out


def test_prepare_takes_its_options(source, tmp_path, capsys):
    flags = [
        "--glob",
        "*.md",
        "*.txt",
        "--document-separator",
        r"\n",
        "--deduplicate",
        "exact",
        "--val-fraction",
        "0",
    ]
    assert run(source, "--out", tmp_path / "out", "--tokenizer", "characters", *flags) == 0
    manifest = load_manifest(tmp_path / "out")
    assert len(manifest.sources) == 3
    assert manifest.splits["train"]["documents"] == 2  # LINE and "# " + LINE
    assert "89 dropped as duplicates, 2 left" in capsys.readouterr().out
    existing = ["--tokenizer", tmp_path / "out", "--document-separator", r"\n", "--val-fraction", "0"]
    assert run(source / "a.txt", "--out", tmp_path / "again", *existing) == 0
    tokenizer = Tokenizer.load(tmp_path / "again")
    assert tokenizer.fingerprint == manifest.tokenizer_fingerprint
    assert "quick brown" in tokenizer.decode(load_tokens(tmp_path / "again", "train"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}/nope"], "no such file or folder"),
        (["{source}", "--glob", "*.tex"], "no file in this folder matches *.tex"),
        (["{source}", "--tokenizer", "{source}/none.json"], "no such tokenizer"),
        (["{source}", "--tokenizer", "{source}/a.txt"], "not a tokenizer.json"),
        (["{source}", "--seed", str(2**64)], "--seed=an integer of 65 bits, expected an integer of 64 bits"),
        (["{source}", "--seed", str(-(2**63) - 1)], "--seed=-9223372036854775809, expected an integer of 64 bits"),
        (["{source}", "--chunk-bytes", str(2**62)], "--chunk-bytes=4611686018427387904, expected at most"),
        (["{source}", "--chunk-bytes", "9" * 40], "--chunk-bytes=an integer of 133 bits, expected at most"),
        (["{source}", "--glob", "/texts/*.txt"], "--glob is '/texts/*.txt', expected a pattern of names in a folder"),
        (["{source}", "--glob", "*.md", "a/**.txt/../**"], "--glob is 'a/**.txt/../**', expected a pattern"),
        (["{source}", "--vocab-size", "12"], "--vocab-size=12, expected at least 257"),
        (["{source}", "--encoding", "ascii"], "a.txt: byte 41 (0xc3) is not ascii text"),
        (["{source}", "--encoding", "klingon"], "is not a text encoding"),
        ([], "inputs is empty"),
        (["--glob", "*.txt", "{source}"], "expected PATH, text files or folders (before --glob"),
    ],
)
def test_prepare_answers_mistakes_in_one_line(source, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert run(*(argument.format(source=source) for argument in arguments), "--out", out) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastlm prepare: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_prepare_overwrites_only_when_asked(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(source, "--out", out, "--tokenizer", "characters") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(source, "--out", out, "--seed", 1, "--tokenizer", "characters") == 1
    assert "already holds train.bin, val.bin, tokenizer.json, manifest.json; add --overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(source, "--out", out, "--seed", 1, "--tokenizer", "characters", "--overwrite") == 0
    assert load_manifest(out, verify=True).preparation["seed"] == 1


@pytest.mark.parametrize("arguments", [["--normalize", "nfd"], ["--seed", "many"], ["--unheard-of"]])
def test_prepare_wrong_usage_exits_with_2(source, tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(source, "--out", tmp_path / "out", *arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--out", ""], ["--out="], ["--out", "x", "--out="]])
def test_an_out_without_a_name_is_refused(flags, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", str(source), *flags]) == 1
    assert capsys.readouterr().err == "fastlm prepare: out names no folder; give one to write to\n"
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    with pytest.raises(ConfigError, match="out names no folder"):
        PrepareConfig(source, "")


def test_prepare_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--out", "--tokenizer", "--val-fraction", "--seed", "--document-separator", "--overwrite"):
        assert flag in text


@pytest.fixture
def table(tmp_path):
    rows = [f'{{"body": "{LINE.strip()} {number}", "lang": "en"}}' for number in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*rows[:20], "{", *rows[20:]]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{table}"], "a.jsonl: row 1: has no column 'text', but 'body', 'lang'; name what is there with --text-col"),
        (["{table}", "--text-column", "body"], "a.jsonl: row 21: is not JSON (Expecting property name"),
        (
            ["{table}", "--text-column", "body", "--on-error", "skip", "--meta-columns", "tag"],
            "--meta-columns is 'tag'",
        ),
        (["{table}", "--on-error", "skip"], "0 documents read, none kept, 41 rows could not be read"),
        (["{table}.none*"], "no file matches this pattern"),
        (["{table}", "--recipe", "nope"], "nope: no such recipe; expected a file, or one of books, web"),
        (
            ["{table}", "--recipe", "books", "--without", "html"],
            "--without is 'html', expected steps of the recipe: fix",
        ),
        (["{table}", "--without", "html"], "--without is 'html', expected a recipe"),
        (["{table}", "--duplicate-pairs", "p.jsonl"], "--duplicate-pairs is 'p.jsonl', expected a recipe with [exact]"),
        (
            ["{table}", "--deduplicate", "none", "--duplicate-pairs", "p.jsonl"],
            "expected a recipe with [exact] or [near], or --deduplicate = exact or near",
        ),
        (["{table}", "--workers", "-1"], "--workers=-1, expected 0 to"),
        (["{table}", "--delimiter", "ab"], "--delimiter='ab', expected one character"),
        (["{table}", "--max-document-bytes", "0"], "--max-document-bytes=0, expected 1 to"),
    ],
)
def test_prepare_answers_mistakes_about_tables_in_one_line(table, tmp_path, capsys, arguments, message):
    given = [argument.format(table=table) for argument in arguments]
    assert run(*given, "--out", tmp_path / "out", *(() if "--workers" in given else ("--workers", 1))) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastlm prepare: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out" / "train.bin").exists()


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        (["--text-column", "body"], "; name what is there with --text-column, or give --on-error skip to leave"),
        (["--meta-columns", "n", "tag"], "; name what is there with --meta-columns, or give --on-error skip to leave"),
        (["--id-column", "tag"], "; name what is there with --id-column, or give --on-error skip to leave"),
        (
            ["--id-column", "a", "--meta-columns", "a"],
            " with --meta-columns or --id-column, or give --on-error",
        ),
    ],
)
def test_a_column_of_a_whole_file_is_named_by_its_flag(flags, end, tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("text,n\none,1\n")
    assert run(path, "--out", tmp_path / "out", "--workers", 1, *flags) == 1
    error = capsys.readouterr().err
    assert "a.csv: has no column " in error
    assert end in error
    assert error.endswith("to leave such files out\n")


def test_a_damaged_file_is_said_to_be_lost_in_part(tmp_path, capsys):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"")
    assert run(path, "--out", tmp_path / "out", "--workers", 1) == 1
    end = "everything from row 1 on is lost; give --on-error skip to leave what is lost of such files out\n"
    assert capsys.readouterr().err.endswith(end)


def test_prepare_says_what_became_of_documents(table, tmp_path, capsys):
    (tmp_path / "r.toml").write_text('[[step]]\nname = "length"\nmin_words = 10\n[exact]\n')
    flags = ["--text-column", "body", "--on-error", "skip", "--recipe", tmp_path / "r.toml", "--workers", 1]
    assert run(table, "--out", tmp_path / "out", "--vocab-size", 300, *flags) == 0
    out = capsys.readouterr().out
    for line in (
        "documents: 40 read, 0 dropped by steps, 0 dropped as duplicates, 40 left",
        "  exact duplicate: 0",
        f"could not read 1 malformed; first {table}: row 21: is not JSON",
    ):
        assert line in out
    assert "near duplicate" not in out + (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out" / "documents").exists()
    assert run(table, "--out", tmp_path / "kept", "--vocab-size", 300, *flags, "--keep-documents") == 0
    assert (tmp_path / "kept" / "documents" / "documents-00000.jsonl.zst").is_file()


@pytest.mark.parametrize("step", ["whitespace", ""])
def test_ctrl_c_says_what_the_same_command_does(step, source, tmp_path, monkeypatch, capsys):
    # The signal comes while the tokenizer is trained: what was cleaned stays.
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[[step]]\nname = "{step}"\n')
    flags = ["--out", tmp_path / "out", "--vocab-size", 300, *(["--recipe", recipe, "--workers", 1] if step else [])]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train_bpe", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert run(source, *flags) == 130
    signal.signal(signal.SIGINT, before)
    assert (tmp_path / "out" / "documents").is_dir() == bool(step)
    shown = capsys.readouterr()
    goes_on = "; the same command goes on from there" if step else ""
    assert (shown.out, shown.err) == ("", f"fastlm prepare: interrupted{goes_on}\n")
    assert run(source, *flags) == 0
    assert not (tmp_path / "out" / "documents").exists()


def test_prepare_lists_its_steps(capsys):
    assert run("--list-steps") == 0
    out = capsys.readouterr().out
    for text in ("length: ", "min_words = 0   an integer of at least 0", "contamination: ", "books, web"):
        assert text in out
