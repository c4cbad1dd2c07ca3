"""C4's rules (Raffel et al. 2020, JMLR 21(140), section 2.2, arXiv:1910.10683)."""

from __future__ import annotations

import functools
import re
from itertools import islice

from ..document import Document, Dropped
from .registry import Count, step
from .words import SEGMENTERS, Segmenter, Words, has_unspaced

# A period, an exclamation or question mark, or a closing quotation mark; those of Chinese and Japanese beside them.
_TERMINAL = (".", "!", "?", '"', "\u201d", "\u3002", "\uff01", "\uff1f", "\uff0e", "\u300d", "\u300f")
_ELLIPSES = ("...", "\u2026")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[(?:\d{1,3}|edit|citation needed)\]")
# One mark or several, at the end of the text or before a blank; those of Chinese need no blank after them.
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f\uff0e]+")


@step("lorem_ipsum", "curly_bracket", "bad_word", "few_sentences", needs=SEGMENTERS)
def c4(
    document: Document,
    *,
    min_words_per_line: Count = 5,
    min_sentences: Count = 3,
    terminal_punctuation: bool = True,
    javascript: bool = True,
    policies: tuple[str, ...] = POLICIES,
    lorem_ipsum: bool = True,
    curly_brackets: bool = True,
    citations: bool = True,
    bad_words: tuple[str, ...] = (),
    chinese: Segmenter = "characters",
) -> Document | Dropped:
    """Keep the lines that C4's rules call sentences, and drop pages that hold few.

    A line stays if it ends in terminal punctuation (and no ellipsis), has 5 words, does not speak of Javascript and
    holds none of six phrases of policies. A page goes if it holds "lorem ipsum", "{" or one of `bad_words` (none is
    shipped), or has fewer than 3 sentences left. Citation marks ([1], [edit], [citation needed]) are removed. 5 words
    and 3 sentences are those of the authors' program and of the paper's revision of 2023; its first print has 3 and 5.
    Sentences are counted by their final marks.
    """
    text = document.text
    lower = text.lower()
    if lorem_ipsum and "lorem ipsum" in lower:
        return Dropped("lorem_ipsum")
    if curly_brackets and "{" in text:
        return Dropped("curly_bracket")
    if bad_words and _any_word(bad_words).search(lower):
        return Dropped("bad_word")
    unwanted = [word for word in (*(["javascript"] if javascript else []), *map(str.lower, policies)) if word in lower]
    unspaced = has_unspaced(text)
    kept = []
    for whole in text.split("\n"):
        line = whole.strip()
        if citations and "[" in line:
            without = _CITATION.sub("", line)
            whole, line = (whole, line) if without == line else (without, without.strip())
        if not line:
            kept.append(whole)
            continue
        if terminal_punctuation and (not line.endswith(_TERMINAL) or line.endswith(_ELLIPSES)):
            continue
        if not _has_words(line, min_words_per_line, unspaced, chinese):
            continue
        if unwanted and any(map(line.lower().__contains__, unwanted)):
            continue
        kept.append(whole)
    result = "\n".join(kept)
    if min_sentences and next(islice(_SENTENCE_END.finditer(result), min_sentences - 1, None), None) is None:
        return Dropped("few_sentences")
    return document if result == text else document._replace(text=result)


def _has_words(line: str, least: int, unspaced: bool, chinese: Segmenter) -> bool:
    if unspaced and has_unspaced(line):
        return Words(line, chinese).count >= least
    return len(line.split(None, least)) >= least


@functools.lru_cache(maxsize=8)
def _any_word(words: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of any of these in lower case: as whole words, or anywhere for scripts without blanks."""
    whole = [re.escape(word.lower()) for word in words if not has_unspaced(word)]
    anywhere = [re.escape(word) for word in words if has_unspaced(word)]
    return re.compile("|".join([*([rf"(?<!\w)(?:{'|'.join(whole)})(?!\w)"] if whole else []), *anywhere]))
