"""The report on prepared data: what the page says, that nothing in a document can act on it, and how it looks."""

import html.parser
import json

import pytest

from browser import CHROMIUM, browser
from fastlm.data.clean import Balance
from fastlm.data.document import Document
from fastlm.data.report import SHOWN_ROWS, render, write_report

ATTACK = '</pre></style><script>document.title="owned"</script><img src="http://127.0.0.1:9/x" onerror="alert(1)">&amp;'
CHINESE = "全角标点，也要保留：《红楼梦》！"


def documents(count):
    """Of three sources, two languages and two labels, some longer than others."""
    for i in range(count):
        meta = {"language": "zh" if i % 3 == 0 else "en", "label": i % 2}
        yield Document(CHINESE * (1 + i % 7) if i % 3 == 0 else "words and words " * (i % 40), f"s{i % 3}.txt", i, meta)


def report(**more):
    read = Balance().add_all(documents(600))
    cleaned = Balance().add_all(document for document in documents(600) if len(document.text) > 50)
    examples = [
        {"source": "pages/<b>one</b>.html", "row": 3, "before": ATTACK, "reason": "few_words"},
        {"source": "pages/two.html", "row": 12, "before": "“Itâ€™s”  " * 90, "after": "“It’s” " * 90},
        {"source": "说明.txt", "row": 1, "before": CHINESE + "\x00\x1b[31m\u202e\ud800" + "x" * 400, "after": CHINESE},
    ]
    steps = [
        {"name": "fix_unicode", "options": {"normalization": "none"}, "documents": 600, "changed": 41, "dropped": {},
         "bytes_in": 1_234_567, "bytes_out": 1_230_001, "examples": examples[1:]},
        {"name": "gopher_quality", "options": {"min_words": 50, "stop_words": ["the", "be"]}, "documents": 600,
         "changed": 0, "dropped": {"few_words": 130, "stop_words": 12, ATTACK: 1}, "bytes_in": 1_230_001,
         "bytes_out": 900_000, "examples": examples[:1]},
        {"name": "personal_data", "documents": 457, "changed": 20, "dropped": {}},
    ]  # fmt: skip
    return {
        "title": f"runs/{'long-name-' * 12}{ATTACK}",
        "inputs": {"files": 3, "documents": 600, "bytes": 1_234_567},
        "problems": [{"source": "broken.jsonl", "row": 7, "message": f"not JSON: {ATTACK}"}],
        "problem_count": 9,
        "steps": steps,
        "masked": {"email": 31, "phone": 8},
        "duplicates": [{"kind": "exact", "documents": 12, "bytes": 40_000, "groups": 9},
                       {"kind": "near", "documents": 31, "bytes": 90_000, "groups": 17, "examples": examples[1:2]}],
        "splits": {"train": {"documents": 400, "tokens": 210_000, "bytes": 800_000, "chars": 700_000},
                   "val": {"documents": 14, "tokens": 11_000, "bytes": 43_000, "chars": 40_000}},
        "read": read.to_dict(),
        "cleaned": cleaned.to_dict(),
        "totals": {"read": 600, "dropped": 143, "duplicates": 43, "emptied": 0, "left": 414},
        "notes": ["tokenizer: bpe of 8,192 tokens"],
        **more,
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a page holds: its tags with attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_says_what_the_report_holds():
    page = Page(render(report()))
    for text in ("143 dropped by steps", "43 dropped as duplicates", "414 documents left 69.0 % of documents left"):
        assert text in page.text, text
    assert "repeated lines" not in page.text
    assert "read cleaned cleaned: what all steps let through, before duplicates are dropped" in page.text
    for text in ("600 documents read", "221,000 tokens", "3.81 bytes a token", "few_words 130", "1.23 MB"):
        assert text in page.text, text
    for text in (ATTACK, CHINESE, "email 31", "near 31", "9 in all", "By language", "By label"):
        assert text in page.text, text


def test_a_document_adds_no_markup():
    tags = Page(render(report())).tags
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "src"]
    links = [attributes["href"] for _, attributes in tags if "href" in attributes]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    plain = Page(render(json.loads(json.dumps(report()).replace(json.dumps(ATTACK)[1:-1], "harmless")))).tags
    assert [tag for tag, _ in tags] == [tag for tag, _ in plain]


def test_control_characters_are_shown_and_none_is_written():
    source = render(report())
    assert not [c for c in source if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in source
    assert "␀␛[31m" in source
    source.encode()


def test_each_part_may_be_left_out():
    whole = report()
    for name in whole:
        assert render({key: value for key, value in whole.items() if key != name})
        assert render({name: whole[name]})
    assert "Nothing was counted" in render({})


def test_written_whole_and_the_same_each_time(tmp_path):
    page, data = write_report(report(), tmp_path)
    first = page.read_bytes(), data.read_bytes()
    write_report(report(), tmp_path)
    assert first == (page.read_bytes(), data.read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    read = json.loads(first[1])
    assert read["steps"][1]["dropped"] == report()["steps"][1]["dropped"]
    assert read["cleaned"] == report()["cleaned"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(report(inputs={"bytes": float("nan")}), tmp_path)
    assert first == (page.read_bytes(), data.read_bytes())


def test_a_table_of_many_sources_shows_the_largest_and_counts_all():
    many = Balance().add_all(Document("x" * i, f"file-{i:05d}.txt", 1) for i in range(1, 1001))
    page = Page(render({"cleaned": many.to_dict()}))
    assert "1,000 in all" in page.text
    assert page.text.count(".txt") == SHOWN_ROWS
    assert "file-01000.txt" in page.text


def test_what_was_not_counted_is_no_column():
    cleaned = Balance().add_all(Document("words", "a.txt", i, {"language": "en"}) for i in range(3))
    read = Balance().add_all(Document("words", "a.txt", i) for i in range(9))  # the language is found by a step
    page = Page(render({"read": read.to_dict(), "cleaned": cleaned.to_dict()})).text
    language = page[page.index("By language") :]
    assert "(none)" not in language
    assert "of those read" not in language
    assert "of those read" in page[page.index("By source") : page.index("By language")]
    assert "1 in all" in language
    page = Page(render({"duplicates": [{"kind": "exact", "documents": 4}]})).text
    assert page.endswith("Duplicates kind dropped exact 4")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as `apt-get install chromium` brings it")
def test_a_browser_shows_it_without_network_errors_or_overflow(tmp_path):
    path, _ = write_report(report(), tmp_path)
    with browser() as page:
        backgrounds = set()
        for width, dark in ((400, False), (400, True), (1280, False), (1280, True)):
            page.open(path, width, dark)
            page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
            assert page.complaints() == []
            assert page.requests() == [path.resolve().as_uri()]
            assert page.evaluate("document.title").startswith("runs/")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            text = page.evaluate("document.body.innerText")
            assert CHINESE in text
            assert "<script>" in text
            boxes = page.evaluate(
                "[...document.querySelectorAll('rect.cleaned')].map(bar => bar.getBoundingClientRect())"
                ".map(box => [box.width, box.height])"
            )
            assert len(boxes) > 3
            assert min(min(box) for box in boxes) > 0
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
