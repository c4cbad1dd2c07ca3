"""Characters: mojibake as ftfy finds it, control characters, whitespace, and OpenCC's two scripts."""

import re
import unicodedata

import ftfy
import opencc
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlm.data.clean import make_step
from fastlm.data.clean.characters import _SUSPECT
from fastlm.data.document import Document, Dropped


def run(name, text, meta=None, **options):
    result = make_step(name, **options)(Document(text, "a", 1, meta or {}))
    return result if isinstance(result, Dropped) else result.text


WANTED = ftfy.TextFixerConfig(
    unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
    uncurl_quotes=False, fix_line_breaks=False, remove_control_chars=False, normalization=None,
)  # fmt: skip
SENTENCES = [
    "naïve café, “it’s” – 20 °C…", "Übergrößenträger für Äpfel", "l’élève a mangé à Noël", "全角，標點：《紅樓夢》！",
    "Привет, мир", "Ελλάδα", "日本語のテキスト", "한국어 문장", "œuvre, cœur ", "Ã vous, Â vous", "¿Qué? ¡No!",
    "10 µm ± 5 ²",
    "😀 emoji 👩‍🚀", "ﬁne ﬂow ﬀ", "ＡＢＣ１２３", "plain", "x² × y³ √2 ≈ 1.4", "«—Où ?»", "│┌─┐│", "‚Äò", "В°", "𝔘",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=4), st.sampled_from(["latin-1", "cp1252", "cp1251", ""])
)
@settings(max_examples=100, deadline=None)
def test_mojibake_is_what_the_library_alone_makes_of_it(sentences, encoding):
    text = "\n".join(sentences)
    if encoding:
        text = "\n".join(sentence.encode().decode(encoding, "replace") for sentence in sentences)
    assert run("fix_unicode", text) == ftfy.fix_text(text, WANTED)


CATEGORIES = "".join(chr(code) for code in range(0x80, 0x10000) if re.match(
    "[" + "".join(MOJIBAKE_CATEGORIES.values()) + "]", chr(code)))  # fmt: skip


@given(st.text(st.sampled_from(CATEGORIES + "aZ .,?\n中，") | st.characters(), max_size=6))
@settings(max_examples=400, deadline=None)
@example("Ã ")
@example("\x85")
@example("a Â ,")
@example("œ.")
def test_no_text_that_the_library_calls_bad_is_passed_over(text):
    if is_bad(text):
        assert _SUSPECT.search(text)
    assert run("fix_unicode", text) == ftfy.fix_text(text, WANTED)


def test_mojibake_of_each_script_comes_back():
    for text in ("全角標點，也要保留：《紅樓夢》！", "Schöne Grüße", "Привет, мир", "it’s “naïve”…"):
        assert run("fix_unicode", text.encode().decode("latin-1")) == text
    assert run("fix_unicode", "Itâ€™s\r\nnaÃ¯ve\r\n") == "It’s\r\nnaïve\r\n"


FULL_WIDTH = "，。！？：；（）《》〈〉「」『』【】、—…·～￥％＃＆＊＋－／＝＠ＡＢＣａｂｃ０１２３\u3000“”‘’"


@pytest.mark.parametrize("name", ["fix_unicode", "control_characters", "whitespace", "boilerplate", "personal_data"])
def test_full_width_forms_ligatures_and_quotes_survive(name):
    for text in (
        f"中{FULL_WIDTH}文",
        "\u3000\u3000段落以两个全角空格开始。",
        "ﬁﬂﬀﬃ æ œ ß ĳ ﷺ ㎏ ①",
        "“a” ‘b’ «c» — … – ·",
    ):
        assert run(name, text) == text


def test_normalization_is_unicodes():
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        for text in ("e\u0301 ﬁ Ａ", "é", "한국"):
            assert run("fix_unicode", text, normalization=form) == unicodedata.normalize(form, text)


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_control_character_is_left_and_no_other_is_lost(text):
    result = run("control_characters", text, max_replacement=1)
    allowed = "\t\n\r"
    invisible = "\u00ad\u200b\u2060\ufeff\ufff9\ufffa\ufffb\ufffe\uffff"
    for c in result:
        assert c in allowed or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
        assert c not in invisible
    if "\x1b" not in text:
        kept = [c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in invisible]
        assert [c for c in result if c not in allowed] == kept


def test_escape_sequences_go_whole_and_joiners_stay():
    assert run("control_characters", "\x1b[31;1mred\x1b[0m \x1b]0;title\x07x \x1b(") == "red x ("
    assert run("control_characters", "page\x0cone\x0btwo\u2028three\u2029four\x85") == "page\none\ntwo\nthree\nfour\n"
    for text in ("👩\u200d🚀", "می\u200cخواهم", "a\u200eb"):
        assert run("control_characters", text) == text
    assert run("control_characters", "\ufffd" * 2 + "a" * 98) == Dropped("replacement_characters")
    assert run("control_characters", "\ufffd" + "a" * 99) == "\ufffd" + "a" * 99


@given(
    st.text("ab \t\n\r\u3000\u00a0中", max_size=40), st.sampled_from(["lf", "keep"]), st.integers(0, 3), st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_whitespace_keeps_every_other_character_and_its_limits(text, line_ends, most, collapse):
    options = {"line_ends": line_ends, "max_blank_lines": most, "collapse": collapse}
    result = run("whitespace", text, **options)
    if not text.strip():
        assert result == Dropped("empty")
        return
    assert "".join(result.split()) == "".join(text.split())
    assert not re.search(r"[ \t\u3000\u00a0](\r?\n|$)", result)
    plain = result.replace("\r\n", "\n")
    assert "\n" * (most + 2) not in plain
    assert not plain.startswith("\n")
    assert not plain.endswith("\n\n")
    assert "\r" not in result or line_ends == "keep"
    assert not collapse or not re.search(r"\S[ \t]{2,}", result)
    assert run("whitespace", result, **options) == result


def test_whitespace_keeps_indentation_and_ideographic_blanks():
    assert run("whitespace", "def f():\n    return 1  \n\n\n\n\nx\n") == "def f():\n    return 1\n\nx\n"
    assert run("whitespace", "\u3000\u3000第一段\u3000。\u3000\n\n\n\u3000\u3000第二段") == (
        "\u3000\u3000第一段\u3000。\n\n\u3000\u3000第二段"
    )
    assert run("whitespace", "a\r\nb \rc\u00a0d") == "a\nb\nc d"
    assert run("whitespace", "a \r\n\r\n\r\n\r\nb\r\n", line_ends="keep") == "a\r\n\r\nb\r\n"


TRADITIONAL = "漢字的繁體與簡體，頭髮、皇后、後來、臺灣、軟體。"


@pytest.mark.parametrize("conversion", ["t2s", "s2t", "s2tw", "s2twp", "s2hk", "tw2s", "tw2sp", "hk2s", "t2tw", "t2hk"])
def test_script_is_what_opencc_alone_makes_of_it(conversion):
    simplified = opencc.OpenCC("t2s").convert(TRADITIONAL)
    for text in (TRADITIONAL, simplified):
        assert run("chinese_script", text, conversion=conversion) == opencc.OpenCC(conversion).convert(text)


def test_script_of_other_languages_stays():
    for text in ("これは漢字とかなの文章です。學校", "plain text", "Grüße"):
        assert run("chinese_script", text) == text
    assert run("chinese_script", "學校", {"language": "ja"}) == "學校"
    assert run("chinese_script", "學校", {"language": "zh"}) == "学校"
    assert run("chinese_script", "學\ud800校") == "学\ufffd校"
