"""Gopher's and C4's rules against counts by hand and in plain Python, and limits on length."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.clean import make_step
from fastlm.data.clean.gopher import duplicate_gram_shares, duplicate_shares, paragraphs_of, top_gram_share
from fastlm.data.clean.words import _ONE_UNSPACED, CHARACTERS_A_WORD, Words, count_unspaced, jieba_tokenizer, words_of
from fastlm.data.document import Document, Dropped


def run(name, text, **options):
    result = make_step(name, **options)(Document(text, "a", 1))
    return result.reason if isinstance(result, Dropped) else result.text


WORDS = [f"word{i}" for i in range(200)]
STOP = "the of "


@pytest.mark.parametrize(
    ("reason", "kept", "dropped"),
    [
        ("few_words", STOP + "word " * 48, STOP + "word " * 47),
        ("many_words", STOP + "word " * 99_998, STOP + "word " * 99_999),
        ("short_words", STOP + "aaa " * 50 + "aaaaa", STOP + "aaa " * 50),  # a mean of 3 + 1/53; 3 - 1/52
        # "the of" is 15 characters short of a mean of ten
        ("long_words", STOP + "aaaaaaaaaa " * 55 + "a" * 25, STOP + "aaaaaaaaaa " * 55 + "a" * 26),
        ("symbols", STOP + "word " * 98 + "#" * 10, STOP + "word " * 97 + "#" * 11),
        ("symbols", STOP + "word… yes... " * 5 + "word " * 88, STOP + "word… yes... " * 5 + "word… " + "word " * 87),
        ("bullets", STOP + "word " * 60 + "\n- word" * 9, STOP + "word " * 60 + "\n- word" * 10),
        ("ellipses", STOP + "word " * 99 + "\nword" * 6 + "\na…" * 3, STOP + "word " * 99 + "\nword" * 5 + "\na…" * 3),
        ("no_letters", STOP + "word " * 78 + "12345 " * 20, STOP + "word " * 77 + "12345 " * 21),
        ("stop_words", "word " * 60 + "The word of", "word " * 60 + "the the"),
    ],
)  # fmt: skip
def test_gopher_quality_at_each_published_threshold(reason, kept, dropped):
    assert run("gopher_quality", kept) == kept
    assert run("gopher_quality", dropped) == reason


def test_gopher_quality_at_work_on_stop_words_with_punctuation_and_capitals():
    text = "word " * 60
    assert run("gopher_quality", text + "“Have, AND.”") == text + "“Have, AND.”"
    assert run("gopher_quality", text + "behave sand") == "stop_words"


CHINESE = "我们沿着河边走到了城外的小村庄，那里的人们正在准备过年。孩子们在院子里跑来跑去，老人坐在门口晒太阳。"


@pytest.mark.parametrize("chinese", ["characters", "jieba"])
def test_rules_on_the_form_of_english_words_leave_chinese_alone(chinese):
    for text in (CHINESE * 2, "這座城市很美。" * 2 + CHINESE * 2, "ภาษาไทยไม่มีช่องว่างระหว่างคำ" * 5):
        assert run("gopher_quality", text, chinese=chinese) == text
    assert run("gopher_quality", CHINESE[:40], chinese=chinese) == "few_words"
    assert run("gopher_quality", "一二三四五" * 7 + "12345 " * 60, chinese=chinese) == "no_letters"


@given(st.text(st.characters() | st.sampled_from("中aにไ𠀀ᄀ가𪜀\U000323af\U000323b0，\ud800\udc00"), max_size=20))
@settings(max_examples=200, deadline=None)
def test_characters_without_blanks_are_counted_in_every_plane(text):
    assert count_unspaced(text) == len(_ONE_UNSPACED.findall(text))


def test_words_of_chinese_are_counted_by_characters_or_by_jieba():
    text = "研究生命的起源，是科学家的工作。"
    letters = [c for c in text if c.isalpha()]
    words = Words(text)
    assert words.count == pytest.approx(len(letters) / CHARACTERS_A_WORD)
    assert words.words == ["研", "究", "生", "命", "的", "起", "源，", "是", "科", "学", "家", "的", "工", "作。"]
    assert words.unspaced
    cut = [word for word in jieba_tokenizer().cut(text) if any(map(str.isalnum, word))]
    assert Words(text, "jieba").count == len(cut)
    assert "".join(Words(text, "jieba").words) == text
    assert Words("an English sentence，with one 字").words == ["an", "English", "sentence，with", "one", "字"]
    assert not Words("an English sentence with one 字").unspaced
    assert words_of("a b").words == words_of("a b").words == ["a", "b"]


def top_by_hand(words, n):
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    return most * max(len("".join(gram)) for gram in counts if counts[gram] == most) / len("".join(words))


def duplicate_by_hand(words, n):
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / max(1, len("".join(words)))


TEXTS = st.lists(st.sampled_from(["a", "bb", "ccc", "dd", "e"]), max_size=60)


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_shares_of_n_grams_are_those_counted_by_hand(words):
    by_hand = [duplicate_by_hand(words, n) for n in range(5, 11)]
    assert duplicate_gram_shares(words, range(5, 11), range(len(words))) == pytest.approx(by_hand)
    for n in (2, 3, 4):
        assert top_gram_share(words, n) == pytest.approx(top_by_hand(words, n))


TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


# Words of which the last eight bytes are equal, words beyond ASCII and the first plane, and long ones.
ALIKE = [letter + "ends-alike" for letter in "abcdefghijkl"] + ["über", "Ende“", "𝔞𝔟", "😀", "x" * 400, "y" * 1100]


@given(
    TEXTS
    | st.lists(st.sampled_from(WORDS[:40]), max_size=200)
    | st.permutations(WORDS[:30] + WORDS[:10] + WORDS[4:12])
    | st.lists(st.sampled_from(ALIKE), max_size=60)
)
@settings(max_examples=200, deadline=None)
def test_short_cuts_never_hide_an_n_gram_that_takes_too_much(words):
    off = {f"max_{name}": 1 for name in ("duplicate_lines", "duplicate_line_characters", "duplicate_paragraphs",
                                         "duplicate_paragraph_characters")}  # fmt: skip
    reasons = [f"top_{n}_gram" for n, most in TOP.items() if top_by_hand(words, n) > most]
    reasons += [f"duplicate_{n}_grams" for n, most in DUPLICATE.items() if duplicate_by_hand(words, n) > most]
    assert run("gopher_repetition", " ".join(words), **off) == [*reasons, " ".join(words)][0]


def test_gopher_repetition_at_each_published_threshold():
    assert duplicate_shares(["ab", "c", "ab", "ab", "dddd"]) == (2 / 5, 4 / 11)
    lines = [f"line {i} of many {i * i}" for i in range(100)]
    assert run("gopher_repetition", "\n".join(lines[:70] + lines[:31])) == "duplicate_lines"
    assert run("gopher_repetition", "\n".join(lines[:70] + lines[:15])) != "duplicate_lines"
    assert run("gopher_repetition", "\n".join([*lines[:9], "x" * 90, "x" * 90])) == "duplicate_line_characters"
    paragraphs = [f"paragraph {i}\nwith its second line {i * i}" for i in range(10)]
    assert paragraphs_of("a\nb\n\n c\n \n\nd") == ["a\nb", "c", "d"]
    twice = "\n\n".join(paragraphs[:6] + [p.replace("\n", "\n\n", 0) for p in paragraphs[:3]])
    assert (
        run("gopher_repetition", twice, max_duplicate_lines=1, max_duplicate_line_characters=1)
        == "duplicate_paragraphs"
    )
    # 85 words apart, then the first 15 again: 15 of 100 words of equal length.
    words = [f"w{i:03d}" for i in range(90)]
    for n, most in zip(range(5, 11), (15, 14, 13, 12, 11, 10), strict=True):
        alone = {f"max_duplicate_{m}_grams": 1 for m in range(5, 11) if m != n}
        at, over = (words[: 100 - k] + words[:k] for k in (most, most + 1))
        assert run("gopher_repetition", " ".join(at), **alone) == " ".join(at)
        assert run("gopher_repetition", " ".join(over), **alone) == f"duplicate_{n}_grams"


def test_repetition_in_chinese():
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    spam = "点击这里领取优惠券，"
    assert run("gopher_repetition", poem + CHINESE) == poem + CHINESE
    assert run("gopher_repetition", CHINESE + spam * 20) != CHINESE + spam * 20
    assert run("gopher_repetition", CHINESE + spam * 20, chinese="jieba") != CHINESE + spam * 20


PAGE = "This is the first sentence here. This is the second one! Is this the third sentence?"


def test_c4_keeps_lines_that_are_sentences():
    gone = "Menu\nNo mark at the end of this line\nFour words only here.\nIt trails off at the end..."
    text = f"{PAGE}\n{gone}\n“He said it all.”"
    assert run("c4", text) == PAGE
    assert run("c4", text, min_words_per_line=4) == f"{PAGE}\nFour words only here.\n“He said it all.”"
    assert run("c4", text, terminal_punctuation=False, min_words_per_line=0) == text
    assert run("c4", f"{PAGE}\n\n{PAGE}\n") == f"{PAGE}\n\n{PAGE}\n"


def test_c4_drops_pages_and_lines_by_what_they_say():
    assert run("c4", f"{PAGE}\nLorem Ipsum dolor.") == "lorem_ipsum"
    assert run("c4", f"{PAGE}\nint main() {{}}") == "curly_bracket"
    assert run("c4", f"{PAGE}\nint main() {{}}", curly_brackets=False) == PAGE
    for line in ("Please enable JavaScript to see this page.", "Our site uses cookies for all of this.",
                 "Read our Privacy Policy before you go on."):  # fmt: skip
        assert run("c4", f"{PAGE}\n{line}") == PAGE
    assert run("c4", "One sentence is all there is. Two are too few here.") == "few_sentences"
    assert run("c4", "One sentence is all there is. Two are too few here.", min_sentences=2).startswith("One")


def test_c4_bad_words_are_whole_words_and_removes_citations():
    assert run("c4", PAGE, bad_words=["THIRD"]) == "bad_word"
    assert run("c4", PAGE, bad_words=["thir", "a+b"]) == PAGE
    assert run("c4", PAGE + "这里有坏词。", bad_words=["坏词"]) == "bad_word"
    cited = PAGE.replace("here", "here[12]").replace("one!", "one[citation needed]!")
    assert run("c4", cited) == PAGE
    assert run("c4", cited, citations=False) == cited


def test_c4_in_chinese():
    page = "我们沿着河边走到了城外的小村庄。那里的人们正在准备过年！谁也没有注意到远处的乌云？"
    assert run("c4", f"{page}\n首页\n没有标点的一行文字不是句子\n好。\n「這是引文裡的一個完整句子。」") == (
        f"{page}\n「這是引文裡的一個完整句子。」"
    )
    assert run("c4", page[:16]) == "few_sentences"
    assert run("c4", page, chinese="jieba") == page


def test_length_counts_characters_words_and_lines():
    text = "one two three\n\n  four  \n"
    for limits, reason in (
        ({"min_characters": 25}, "short"), ({"max_characters": 23}, "long"), ({"min_words": 5}, "few_words"),
        ({"max_words": 3}, "many_words"), ({"min_lines": 3}, "few_lines"), ({"max_lines": 1}, "many_lines"),
        ({"max_line_length": 12}, "long_line"),
    ):  # fmt: skip
        assert run("length", text, **limits) == reason
        [(name, limit)] = limits.items()
        assert run("length", text, **{name: limit - 1 if name.startswith("min") else limit + 1}) == text
    assert run("length", "") == "short"
    assert run("length", "", min_characters=0) == ""
    assert run("length", "中" * 30, min_words=20, max_words=20) == "中" * 30


def test_boilerplate_by_list():
    lines = [
        "Home",
        "» Log In «",
        "[Skip to content]",
        "Our site uses cookies to serve you.",
        "首页",
        "版权所有 © 2024",
    ]
    text = "The text begins.\nAnd goes on at home."
    assert run("boilerplate", "\n".join([*lines, text, *lines])) == text
    long = "It says that the site uses cookies, " * 5
    assert run("boilerplate", long) == long
    assert run("boilerplate", "home\nHOME") == "empty"
    assert run("boilerplate", "Start\nHome\nend", lines=["start"]) == "Home\nend"
    assert run("boilerplate", "a\nForty-Two here\nb", phrases=["TWO HERE"]) == "a\nb"


def test_boilerplate_by_frequency_is_a_header_of_pages_and_neither_a_refrain_nor_a_speaker():
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8)) for _ in range(300)]
    pages = [
        line
        for page in range(10)
        for line in (f"The History of Tin   Page {page + 1}", *lines[page * 30 : page * 30 + 30])
    ]
    assert run("boilerplate", "\n".join(pages)) == "\n".join([pages[0], *lines])
    assert run("boilerplate", "\n".join(pages), pages=0) == "\n".join(pages)
    assert run("boilerplate", "\n".join(pages[: 31 * 4])) == "\n".join(pages[: 31 * 4])
    song = [line for verse in range(40) for line in (*lines[verse * 4 : verse * 4 + 4], "And so say all of us")]
    play = [line for speech in range(100) for line in ("HAMLET.", *lines[speech * 2 : speech * 2 + draw.randint(1, 2)])]
    exits, place = list(lines), 20
    while place < len(exits):
        exits[place] = "Exeunt all"
        place += draw.choice([21, 80])
    for kept in (song, play, exits, ["}"] * 500):
        assert run("boilerplate", "\n".join(kept)) == "\n".join(kept)
