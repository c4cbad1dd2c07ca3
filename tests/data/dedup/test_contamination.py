"""Text of evaluation sets in documents, against Python's sets of n-grams."""

import random

import pytest

from data.dedup.corpus import WORD
from fastlm.data.dedup import CONTAMINATED, Contamination, ContaminationOptions
from fastlm.data.document import Document, Dropped


def words_of(text):
    return WORD.findall(text.lower())


def windows(words, n):
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


@pytest.mark.parametrize(("ngram", "shortest"), [(13, 8), (4, 2), (3, 3)])
def test_matches_are_those_of_sets(ngram, shortest):
    rng = random.Random(0)

    def text(most):
        separator = rng.choice([" ", ", ", "\n"])
        return separator.join(rng.choice(["a", "B", "中"]) for _ in range(rng.randrange(most)))

    evaluations = [(f"q{number}", text(ngram + 3)) for number in range(12)]
    texts = [f"{text(30)} {rng.choice(evaluations)[1][rng.randrange(9) :]} {text(30)}" for _ in range(400)]
    step = Contamination(evaluations, ContaminationOptions(ngram, shortest))
    grams = {}
    for name, question in evaluations:
        words = words_of(question)
        if len(words) >= shortest:
            for gram in windows(words, min(ngram, len(words))):
                grams.setdefault(gram, name)
    sizes = {len(gram) for gram in grams}
    found = list(step.find(texts))
    assert 20 < sum(match is not None for match in found) < 400
    for document, match in zip(texts, found, strict=True):
        words = words_of(document)
        hits = [(at, gram) for size in sizes for at, gram in enumerate(windows(words, size)) if gram in grams]
        assert (match is None) == (not hits)
        if match:
            assert match.word == min(at for at, _ in hits)
            assert match.shared == len(hits)
            assert match.evaluation in {grams[gram] for at, gram in hits if at == match.word}
        assert step(Document(document, "f", 1)) == (
            Document(document, "f", 1) if match is None else Dropped(CONTAMINATED)
        )


def test_a_question_is_found_within_a_long_document_whatever_its_case_and_punctuation():
    question = "What is the name of the river that runs through the old town of Heidelberg?"
    step = Contamination([("geography", question)])
    shouted = question.upper().replace(" ", " -- ")
    texts = ["word " * 50_000 + shouted + " word" * 10, "word " * 50_000]
    (match, nothing) = step.find(texts)
    assert match == ("geography", 50_000, 3)
    assert nothing is None


def test_chinese_goes_by_the_character():
    step = Contamination([("poem", "床前明月光疑是地上霜举头望明月")])
    found = list(step.find(["他念道\uff1a「床前明月光\uff0c疑是地上霜。举头望明月。」", "床前明月光\uff0c疑是地上"]))
    assert found[0] == ("poem", 3, 3)
    assert found[1] is None


def test_the_first_evaluation_text_with_an_n_gram_is_named():
    text = "one two three four five six seven eight nine ten"
    step = Contamination([("short", "one two"), ("first", text), ("second", text)])
    assert next(step.find([text])).evaluation == "first"


def test_without_evaluation_texts_nothing_is_contaminated():
    step = Contamination([("short", "one two")])
    assert list(step.find(["one two", ""])) == [None, None]


@pytest.mark.parametrize("options", [{"shortest": 0}, {"shortest": 14}, {"ngram": 7}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="shortest: got"):
        ContaminationOptions(**options)
