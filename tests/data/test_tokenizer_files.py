"""Tokenizers of every kind: the ids of their own library, and no special token out of text that spells its name."""

import base64
import unicodedata

import pytest
import regex
import sentencepiece
import tiktoken
from tokenizers import Regex, pre_tokenizers

from fastlm.data import Tokenizer
from fastlm.data.tokenizers import tiktoken as ours
from fastlm.errors import DataError

ENGLISH = "The naïve cat's mat, 12345 don'T   I'LL\n\n\tsit! (on) unbelievable_things: x=y;\r\n end "
CHINESE = "我与父亲不相见已二年余了，我最不能忘记的是他的背影。那年冬天，祖母死了。\n"
OTHERS = "Größe ἄλφα привет мир 한국어 🙂👩‍👩‍👧 é é ﬁ\u3000ａｂｃ"
TEXTS = [ENGLISH, CHINESE, OTHERS, f"{ENGLISH}{CHINESE}{OTHERS}", "", " ", "\n", "a"]
LINES = [line for text in TEXTS for line in text.splitlines() if line.strip()]


def ranks_of(tokenizer):
    """Bytes and ranks of a byte-level BPE, in the order of its ids."""
    byte_of = {letter: byte for byte, letter in enumerate(ours.byte_letters())}
    names = sorted(tokenizer._vocabulary, key=tokenizer._vocabulary.__getitem__)
    return {bytes(byte_of[letter] for letter in name): rank for rank, name in enumerate(names)}


def write_tiktoken(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def published(name, monkeypatch):
    """A public encoding of tiktoken's as its constructor has it, but for the ranks, which it would fetch."""
    from tiktoken_ext import openai_public

    for function in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, function, lambda *_, **__: {})
    monkeypatch.setattr(tiktoken.Encoding, "__init__", lambda *_, **__: None)
    return openai_public.ENCODING_CONSTRUCTORS[name]()


@pytest.mark.parametrize("count", [50256, 50280, 100256, 199998])
def test_public_encodings_have_tiktokens_pattern_and_special_tokens(count, monkeypatch):
    encoding = ours.KNOWN[count]
    theirs = published(encoding.name, monkeypatch)
    assert encoding.special == theirs["special_tokens"]
    for text in TEXTS:
        assert regex.findall(encoding.pattern, text) == regex.findall(theirs["pat_str"], text)
        # By the engine that the tokenizers library has for expressions, too.
        cut = pre_tokenizers.Split(Regex(encoding.pattern), "isolated").pre_tokenize_str(text)
        assert [part for part, _ in cut] == regex.findall(theirs["pat_str"], text)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "qwen"])
def test_tiktokens_files_give_tiktokens_ids(name):
    known = next(kind for kind in ours.KNOWN.values() if kind.name == name)
    ranks = ranks_of(Tokenizer.train_bpe(TEXTS * 2, 500, special=()))
    special = {token: len(ranks) + number for number, token in enumerate(known.special)}
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    mine = Tokenizer(ours.definition(data, "x", known._replace(special=special)))
    theirs = tiktoken.Encoding(name, pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=special)
    for text in [*TEXTS, *(f"a {token} b" for token in special)]:
        assert mine.encode(text) == theirs.encode(text, disallowed_special=())
    joined = "a".join(special)
    assert mine.encode(joined, special_tokens=True) == theirs.encode(joined, allowed_special="all")


@pytest.mark.slow
def test_a_tiktoken_file_is_known_by_its_number_of_ranks(tmp_path):
    made = {bytes([byte]): byte for byte in range(256)}
    pairs = (bytes([a, b, c]) for a in range(256) for b in range(256) for c in (0, 1))
    ranks = made | {next(pairs): rank for rank in range(256, 50256)}
    write_tiktoken(tmp_path / "a.tiktoken", ranks)
    assert Tokenizer.load(tmp_path / "a.tiktoken").eot_id == 50256
    write_tiktoken(tmp_path / "a.tiktoken", made)
    with pytest.raises(DataError, match=r"a.tiktoken: has 256 ranks, expected those of a published encoding: 50256"):
        Tokenizer.load(tmp_path / "a.tiktoken")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """SentencePiece's own models of several kinds."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "unigram": {"model_type": "unigram"},
        "unigram bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 420},
        "bpe": {"model_type": "bpe"},
        "bpe bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 420, "add_dummy_prefix": False,
                      "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    }  # fmt: skip
    for name, options in kinds.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 3), model_prefix=str(folder / name), user_defined_symbols=["<sep>"],
            **{"vocab_size": 150, "hard_vocab_limit": False, "minloglevel": 2} | options,
        )  # fmt: skip
    return folder


SENTENCEPIECE = ["unigram", "unigram bytes", "bpe", "bpe bytes"]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepieces_files_give_its_ids(kind, models):
    mine = Tokenizer.load(models / f"{kind}.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models / f"{kind}.model"))
    for text in [*LINES, " two  blanks ", "a<sep>b", "<sep>a<sep>", "unseen: 龘 ਅ"]:
        assert mine.encode_lossy([text]) == [theirs.encode(text)], text


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'()[]_:;=|<>/"]
VOCABULARY += ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
VOCABULARY += ["the", "cat", "##s", "un", "##believ", "##able", "things", "mask", "sep", "父", "亲", "我", "与", "，"]
VOCABULARY = list(dict.fromkeys(VOCABULARY))


def wordpiece_by_hand(word):
    """Devlin et al. 2019: the longest token first, or the unknown one for all of the word."""
    ids, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1)
        names = ("##" * bool(start) + word[start:end] for end in ends)
        end, name = next(((e, n) for e, n in zip(ends, names, strict=True) if n in VOCABULARY), (0, ""))
        if not name:
            return [VOCABULARY.index("[UNK]")]
        ids.append(VOCABULARY.index(name))
        start = end
    return ids


def bert_words(text):
    """Lower case without accents, at blanks and marks, Chinese by the character."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return regex.findall(r"\p{Han}|[^\s\p{Han}\p{P}$+<=>^`|~]+|[\p{P}$+<=>^`|~]", text)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "[MASK] [SEP]the[CLS]", "Les CATS UNBELIEVABLE 龘"])
def test_a_vocab_txt_gives_berts_ids(text, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    want = [number for word in bert_words(text) for number in wordpiece_by_hand(word)]
    assert tokenizer.encode(text) == want


def every_kind(models, tmp_path):
    yield "trained bpe", Tokenizer.train_bpe(TEXTS, 400, special=("<|endoftext|>", "<|im_start|>"))
    yield "wordpiece", Tokenizer.train_wordpiece(TEXTS * 2, 400)
    yield "trained unigram", Tokenizer.train_unigram(TEXTS, 500, special=("<pad>", "<s>", "</s>", "[MASK]"))
    yield "characters", Tokenizer.characters(["".join(map(chr, range(32, 127)))], special=("<s>", "</s>", "a</s>"))
    for kind in SENTENCEPIECE:
        yield kind, Tokenizer.load(models / f"{kind}.model")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    yield "vocab.txt", Tokenizer.load(tmp_path / "vocab.txt")
    ranks = ranks_of(Tokenizer.train_bpe(TEXTS * 2, 500, special=()))
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    known = ours.Encoding("x", ours.KNOWN[100256].pattern, {"<|endoftext|>": 600, "<|fim_prefix|>": 601})
    yield "tiktoken", Tokenizer(ours.definition(data, "x", known))


def test_no_kind_makes_a_special_token_of_text(models, tmp_path):
    seen = set()
    for kind, tokenizer in every_kind(models, tmp_path):
        names = {token.content: number for number, token in tokenizer._backend.get_added_tokens_decoder().items()
                 if token.special and number != tokenizer.unknown_id}  # fmt: skip
        assert names, kind
        assert kind not in seen
        for name in names:
            for text in (name, f"a{name}b", f" {name} ", name * 2, f"{name}\n", name[:-1] + name):
                for ids in (tokenizer.encode_lossy([text])[0], tokenizer.encode_arrays([text])[0].tolist()):
                    assert ids
                    assert not set(names.values()) & set(ids), (kind, text, ids)
        seen.add(kind)
    assert len(seen) == 6 + len(SENTENCEPIECE)


def test_a_unigram_says_how_many_ids_its_characters_need():
    texts = [" ".join(chr(0x4E00 + (number * k) % 200) + "a" for k in range(1, 20)) for number in range(200)]
    with pytest.raises(
        DataError, match=r"^vocab_size=300: a Unigram on this text needs at least (\d+), for its"
    ) as said:
        Tokenizer.train_unigram(texts, 300)
    least = int(str(said.value).split("least ")[1].split(",")[0])
    assert Tokenizer.train_unigram(texts, least).vocab_size <= least
    with pytest.raises(DataError, match="at least"):
        Tokenizer.train_unigram(texts, least - 1)
