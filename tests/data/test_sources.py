"""Sources: every format and compression against the library that wrote it, and what is said of damaged files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import compression
from fastlm.data.document import Document
from fastlm.data.reading import read_text
from fastlm.data.sources import Bad, File, SourceOptions, cut, find, read_file
from fastlm.errors import DataError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstd = compression.zstandard()

TEXTS = [
    "Plain words.",
    "北京欢迎你\uff0c再见\u3002",
    'A "quoted", comma\nand two lines',
    "tab\there",
    "🙂 é\u0301",
    "",
    "x" * 3000,
]
ROWS = [
    {"id": index, "text": text, "lang": "zh" if index == 1 else "en", "n": index / 2}
    for index, text in enumerate(TEXTS)
]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd.compress(data),
}
OPTIONS = SourceOptions(meta_columns=("lang", "n"), id_column="id")


def as_csv(rows, **options):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows, **options):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def as_arrow(rows, new):
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


MAKE = {
    "jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "csv": as_csv,
    "parquet": lambda rows: as_parquet(rows, row_group_size=2),
    "arrow": lambda rows: as_arrow(rows, pa.ipc.new_file),
    "feather": lambda rows: as_arrow(rows, pa.ipc.new_stream),
}


def read(path, options=OPTIONS, **part):
    (file,) = find([path], ["*"], options.format)
    return list(read_file(file, options, **part))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("compressed", COMPRESS)
def test_a_table_gives_what_was_written(kind, compressed, tmp_path):
    path = tmp_path / f"t.{kind}{compressed}"
    path.write_bytes(COMPRESS[compressed](MAKE[kind](ROWS)))
    got = read(path)
    value = str if kind == "csv" else lambda x: x
    want = [
        Document(row["text"], str(path), number, {"lang": row["lang"], "n": value(row["n"]), "id": value(row["id"])})
        for number, row in enumerate(ROWS, start=1)
    ]
    assert got == want


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("compressed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 40, 100, 10**6])
def test_units_hold_every_row_once_in_order_and_all_bytes(kind, compressed, size, tmp_path):
    paths = []
    for name in ("a", "b/a", "c"):
        paths.append(tmp_path / f"{name}.{kind}{compressed}")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(COMPRESS[compressed](MAKE[kind](ROWS)))
    files = find(paths, ["*"])
    units = list(cut(files, OPTIONS, size))
    got = []
    for unit in units:
        got += unit.rows
        for span in unit.spans:
            got += read_file(span.file, OPTIONS, None, span.start, span.stop, span.first_row)
    assert got == [row for file in files for row in read_file(file, OPTIONS)]
    assert sum(unit.size for unit in units) == sum(path.stat().st_size for path in paths)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert [file for unit in units for file in unit.ends] == files
    assert len({unit.identity for unit in units}) == len(units)


@settings(deadline=None)
@given(lines=st.lists(st.text(st.sampled_from("aé北🙂 ")), max_size=12), size=st.integers(1, 200), end=st.booleans())
def test_parts_of_json_lines_have_the_rows_and_numbers_of_the_whole(lines, size, end, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    data = b"\n".join(json.dumps({"text": line}).encode() if line != " " else b"" for line in lines)
    path.write_bytes(data + b"\n" * end)
    options = SourceOptions()
    units = cut([File(path, "jsonl")], options, size)
    got = [
        row
        for unit in units
        for span in unit.spans
        for row in read_file(span.file, options, None, span.start, span.stop, span.first_row)
    ]
    want = [Document(text, str(path), number) for number, text in enumerate(lines, start=1) if text != " "]
    assert got == want


@pytest.mark.parametrize("compressed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_a_truncated_archive_gives_its_rows_and_then_says_so(compressed, kind, tmp_path):
    rng = random.Random(0)
    rows = [{"text": " ".join(str(rng.random()) for _ in range(50))} for _ in range(300)]
    data = MAKE[kind](rows) if kind in MAKE else "\n".join(row["text"] for row in rows).encode()
    options = SourceOptions(document_separator=r"\n", chunk_bytes=1000)
    whole = COMPRESS[compressed](data)
    path = tmp_path / f"t.{kind}{compressed}"
    for keep in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        *good, last = read(path, options)
        assert isinstance(last, Bad), last
        assert last.kind == "truncated"
        assert str(last).endswith(f"cut short; everything from row {last.row} on is lost")
        assert [row.text for row in good] == [row["text"] for row in rows[: len(good)]]


@pytest.mark.parametrize("compressed", [".gz", ".bz2", ".xz", ".zst"])
def test_an_archive_without_a_byte_is_truncated_and_one_of_nothing_is_not(compressed, tmp_path):
    path = tmp_path / f"t.txt{compressed}"
    path.write_bytes(b"")
    assert [row.kind for row in read(path, SourceOptions())] == ["truncated"]
    with pytest.raises(DataError, match=f"^{path}: the compressed file is damaged or cut short"):
        list(read_text(path))
    path.write_bytes(COMPRESS[compressed](b""))
    assert not any(isinstance(row, Bad) for row in read(path, SourceOptions()))
    assert list(read_text(path)) == []


@pytest.mark.parametrize("compressed", [".gz", ".bz2", ".xz", ".zst"])
def test_several_archives_in_one_file_are_all_read(compressed, tmp_path):
    path = tmp_path / f"t.jsonl{compressed}"
    path.write_bytes(b"".join(COMPRESS[compressed](MAKE["jsonl"]([row])) for row in ROWS))
    assert [row.text for row in read(path, SourceOptions())] == TEXTS


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "parquet", "arrow", "warc.gz"])
def test_a_file_that_is_something_else_is_damaged_not_a_crash(kind, tmp_path):
    for name, data in {"text": b"just some text, and not short either" * 9, "empty": b""}.items():
        path = tmp_path / f"{name}.{kind}"
        path.write_bytes(data)
        rows = read(path, SourceOptions())
        assert all(isinstance(row, Bad) and row.kind in ("damaged", "truncated") for row in rows), rows
        assert rows or (name == "empty" and "." not in kind) or (name == "text" and kind == "warc.gz")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_a_truncated_table_is_said_to_be_damaged(keep, kind, tmp_path):
    path = tmp_path / f"t.{kind}"
    data = MAKE[kind](ROWS * 50)
    path.write_bytes(data[: int(len(data) * keep)])
    assert any(isinstance(row, Bad) for row in read(path))


@pytest.mark.parametrize("size", [10**6, 1])
def test_damage_within_a_table_says_how_many_rows_it_costs(size, tmp_path):
    path = tmp_path / "t.parquet"
    rows = [{"text": f"row {index}", "lang": "en", "n": 1.0, "id": index} for index in range(60)]
    path.write_bytes(as_parquet(rows, row_group_size=20, compression="zstd", use_dictionary=False))
    column = parquet.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    path.write_bytes(data)
    (file,) = find([path], ["*"])
    found = [row for unit in cut([file], OPTIONS, size) for span in unit.spans for row in read_file(*_part(span))]
    (bad,) = [row for row in found if isinstance(row, Bad)]
    assert (bad.row, bad.kind) == (21, "damaged")
    last = 60 if size > 1 else 40  # a part of a file that is read on its own loses its own rows alone
    assert str(bad).endswith(f"; everything from row 21 to row {last} is lost, {last - 20} rows")
    assert [row.text for row in found if isinstance(row, Document)] == [
        row["text"] for row in rows if not 20 <= row["id"] < last
    ]


def _part(span):
    return span.file, OPTIONS, None, span.start, span.stop, span.first_row


BAD_LINES = [
    (b'{"text": "half', "malformed", "is not JSON"),
    (b"[1, 2]", "malformed", "is [1, 2], expected a JSON object"),
    (b'{"other": 1, "title": 2}', "no column", "has no column 'text', but 'other', 'title'"),
    (b'{"text": 7}', "not text", "column 'text' holds int 7, expected text"),
    (b'{"text": "\\ud800"}', "undecodable", "lone surrogate"),
    (b'{"text": "\xff"}', "undecodable", "is not utf-8 text"),
    (b"[" * 1900, "malformed", "is not JSON"),
    (b'{"text": "' + b"x" * 1000 + b'"}', "too long", "more than 999 bytes"),
    (b'{"text": "' + b"x" * 3000 + b'"}', "too long", "more than 999 bytes"),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_read(line, kind, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": "four"}\n{"text": null}')
    first, bad, *rest = read(path, SourceOptions(max_bytes=999))
    assert (first.text, [(row.text, row.row) for row in rest]) == ("one", [("four", 4), ("", 5)])
    assert (bad.source, bad.row, bad.kind) == (str(path), 2, kind)
    assert message in bad.message


def test_csv_rows_are_read_or_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbftext,lang\r\n"a ""b""\r\nc",en\r\nonly\r\n\r\nd,e,f\r\n\xff,en\r\n"x"y,en\r\nlast,en\r\n"open'
    )
    rows = read(path, SourceOptions(meta_columns=("lang",)))
    assert [(row.row, row.kind if isinstance(row, Bad) else row.text) for row in rows] == [
        (1, 'a "b"\r\nc'), (2, "malformed"), (3, "malformed"), (4, "undecodable"), (5, "malformed"), (6, "last"),
        (7, "malformed"),
    ]  # fmt: skip
    assert "has 1 fields, expected the 2 of the header" in rows[1].message


def test_csv_in_other_dialects(tmp_path):
    for name, data, options in [
        ("a.tsv", 'text\tn\nhe said "no"\t1\n"x"\t2\n', {}),
        ("b.csv", 'n;text\n1;he said "no"\n2;"""x"""\n', {"delimiter": ";"}),
        ("c.csv", '1,"he said ""no"""\n2,"""x"""\n', {"header": False, "text_column": "2"}),
        ("d.tsv", 'text\n"he said ""no"""\n"""x"""\n', {"quoting": "minimal"}),
    ]:
        (tmp_path / name).write_text(data)
        assert [row.text for row in read(tmp_path / name, SourceOptions(**options))] == ['he said "no"', '"x"']
    (tmp_path / "e.csv").write_bytes("text,n\n北京,1\n".encode("utf-16"))
    assert [row.text for row in read(tmp_path / "e.csv", SourceOptions(encoding="utf-16"))] == ["北京"]
    (tmp_path / "f.csv").write_bytes("text,n\n北京,1\n".encode("gb18030"))
    assert [row.text for row in read(tmp_path / "f.csv", SourceOptions(encoding="gb18030"))] == ["北京"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "feather"])
def test_a_column_that_is_not_there_is_said_once_for_the_file(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(MAKE[kind](ROWS))
    for options in (SourceOptions(text_column="body"), SourceOptions(meta_columns=("body",))):
        (bad,) = read(path, options)
        assert bad.kind == "no column"
        assert "has no column 'body', but 'id', 'text', 'lang', 'n'" in str(bad)


def warc_record(kind, body, uri="http://example.org/", content_type="application/http; msgtype=response"):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{random.randrange(10**9):012}>\r\n"
        f"WARC-Target-URI: {uri}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def http(body, headers="Content-Type: text/html; charset=utf-8", status="200 OK"):
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body


PAGE = "<html><head><title>x</title></head><body>Größe 北京\uff0c</body></html>"


@pytest.fixture
def crawl():
    return [
        warc_record("warcinfo", b"software: x\r\n", content_type="application/warc-fields"),
        warc_record("request", b"GET / HTTP/1.1\r\n\r\n", content_type="application/http; msgtype=request"),
        warc_record("response", http(PAGE.encode()), "http://a/"),
        warc_record("response", http(b"\x89PNG", "Content-Type: image/png"), "http://a/x.png"),
        warc_record("response", http(b"gone", status="404 Not Found"), "http://a/none"),
        warc_record("response", http(PAGE.encode("gb18030"), "Content-Type: text/html; charset=gb2312"), "http://b/"),
        warc_record(
            "response",
            http(gzip.compress(PAGE.encode()), "Content-Type: text/html; charset=utf-8\r\nContent-Encoding: gzip"),
            "http://c/",
        ),
        warc_record("conversion", "plain text of 北京".encode(), "http://d/", "text/plain"),
        warc_record("response", http(b"x" * 5000, "Content-Type: text/plain"), "http://e/"),
    ]


@pytest.mark.parametrize("compressed", COMPRESS)
def test_a_crawl_gives_its_pages(compressed, crawl, tmp_path):
    path = tmp_path / f"a.warc{compressed}"
    path.write_bytes(b"".join(map(COMPRESS[compressed], crawl)))
    rows = read(path, SourceOptions(max_bytes=1000))
    assert [row.meta["url"] for row in rows if isinstance(row, Document)] == [f"http://{x}/" for x in "abcd"]
    assert [row.text for row in rows[:4]] == [PAGE, PAGE, PAGE, "plain text of 北京"]
    assert rows[0].meta == {"url": "http://a/", "date": "2026-01-02T03:04:05Z", "media_type": "text/html"}
    assert [(row.row, row.kind) for row in rows[4:]] == [(7, "too long")]


@pytest.mark.parametrize("compressed", COMPRESS)
def test_a_truncated_crawl_says_so(compressed, crawl, tmp_path):
    path = tmp_path / f"a.warc{compressed}"
    archives = [*map(COMPRESS[compressed], crawl[:3])]
    whole = b"".join(archives)
    for keep in (len(whole) - 20, len(whole) - len(archives[-1]) // 2, len(whole) - len(archives[-1]) + 15):
        path.write_bytes(whole[:keep])
        rows = read(path, SourceOptions())
        assert [row.kind for row in rows if isinstance(row, Bad)] == ["truncated"], (keep, rows)
        assert not [row for row in rows if isinstance(row, Document)]


@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_a_page_that_is_cut_anywhere_has_the_number_that_it_has_whole(compressed, tmp_path):
    path = tmp_path / f"a.warc{compressed}"
    one, two, three = (COMPRESS[compressed](warc_record("response", http(PAGE.encode()))) for _ in range(3))
    for keep in range(12, len(three) - len(PAGE.encode()), 7):
        path.write_bytes(one + two + three[:keep])
        *good, bad = read(path, SourceOptions())
        assert ([row.row for row in good], bad.row) == ([1, 2], 3), keep
        assert bad.kind in ("truncated", "damaged")  # where half a word of the header is left


def test_pages_are_read_in_the_encoding_that_they_declare(tmp_path):
    head = '<html><head><meta charset="{}"></head>北京\uff0c</html>'
    for name, codec in [("gb2312", "gb18030"), ("big5", "big5"), ("utf-8", "utf-8"), ("utf-8", "utf-8-sig")]:
        page = head.format(name)
        (tmp_path / "a.html").write_bytes(page.encode(codec))
        (row,) = read(tmp_path / "a.html", SourceOptions())
        assert (row.text, row.meta["media_type"]) == (page, "text/html")
    (tmp_path / "a.html").write_bytes(b"\xff\xfe" + "<p>北京".encode("utf-16-le"))
    assert read(tmp_path / "a.html", SourceOptions())[0].text == "<p>北京"
    (tmp_path / "a.html").write_bytes(b"<p>caf\xe9")
    assert read(tmp_path / "a.html", SourceOptions())[0].kind == "undecodable"
    assert read(tmp_path / "a.html", SourceOptions(errors="replace"))[0].text == "<p>caf\ufffd"


@pytest.mark.slow
def test_folders_of_the_datasets_library_are_read_as_it_reads_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = ROWS * 9
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "two")
    for folder in ("one", "two"):
        got = [row for file in find([tmp_path / folder], ["*.txt"]) for row in read_file(file, OPTIONS)]
        there = datasets.load_from_disk(tmp_path / folder)
        parts = there.values() if folder == "two" else [there]
        want = [(row["text"], row["id"], row["lang"]) for part in parts for row in part]
        assert [(row.text, row.meta["id"], row.meta["lang"]) for row in got] == want
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003.arrow: missing, but named by"):
        find([tmp_path / "one"], [])


def test_files_are_found_by_folder_name_and_pattern(tmp_path):
    for name in ("a/x.jsonl", "b/x.jsonl", "c.txt", "d.jsonl.gz", "e.unknown", "f.CSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find([tmp_path / "**" / "*.jsonl*", tmp_path / "c.txt", tmp_path / "e.unknown", tmp_path / "f.CSV"], [])
    assert [(str(file.path.relative_to(tmp_path)), file.format) for file in found] == [
        ("a/x.jsonl", "jsonl"), ("b/x.jsonl", "jsonl"), ("d.jsonl.gz", "jsonl"), ("c.txt", "text"),
        ("e.unknown", "text"), ("f.CSV", "csv"),
    ]  # fmt: skip
    assert {file.format for file in find([tmp_path / "a"], ["*"], "text")} == {"text"}
    with pytest.raises(DataError, match=r"nothing\*: no file matches this pattern"):
        find([tmp_path / "nothing*"], [])
    with pytest.raises(
        DataError, match=r"no file in this folder matches \*.tex; .* --glob '\*.csv' '\*.jsonl' '\*.jsonl.gz'"
    ):
        find([tmp_path], ["*.tex"])
