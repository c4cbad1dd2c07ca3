"""Tokenizers against the `tokenizers` library reading the same file, and against the text itself."""

import hashlib
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastlm.data import END_OF_TEXT, Tokenizer
from fastlm.errors import ConfigError, DataError

CORPUS = [
    "It was the best of times, it was the worst of times;\r\n\tit was the age of wisdom.\n\n" * 3,
    "Grüße aus Köln: naïve façade, Ελληνικά, русский язык, 北京欢迎你\uff0c你好世界。 " * 3,
    "def f(x):\n    return x ** 2  # 1234567890 🙂👩‍👩‍👧 e\u0301 \x00\ufeff\u2028 " * 3,
]


def make_bpe():
    return Tokenizer.train_bpe(CORPUS, 400)


def make_byte_fallback():
    """Llama's kind: words begin with a mark, unknown characters become byte tokens, decoding fuses them."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for character in "▁abcdefghijklmnopqrstuvwxyz":
        vocabulary[character] = len(vocabulary)
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend.to_str())


BPE = make_bpe()
CHARACTERS = Tokenizer.characters(CORPUS)
KINDS = {"bpe": BPE, "characters": CHARACTERS, "byte_fallback": make_byte_fallback()}

any_text = st.text() | st.lists(st.sampled_from([*CORPUS[2], " ", "the", END_OF_TEXT, "\r\n"])).map("".join)


@given(any_text)
def test_bpe_round_trips_any_text(text):
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode(BPE.encode(text, special_tokens=True)) == text


def test_bpe_has_a_token_for_every_byte():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000 * 8), 0x10FFFF]))
    untrained = Tokenizer.train_bpe(["aaaa"], 257)
    assert untrained.vocab_size == 257
    ids = untrained.encode(every)
    assert len(ids) == len(every.encode())  # no merge fits into 257, so a token is a byte
    assert untrained.decode(ids) == every


def test_bpe_training_is_repeatable_and_learns():
    assert make_bpe().fingerprint == BPE.fingerprint
    assert BPE.vocab_size == 400
    assert len(BPE.encode(CORPUS[0])) < 0.6 * len(CORPUS[0])


@pytest.mark.parametrize("vocab_size", [0, 256])
def test_bpe_refuses_a_vocabulary_without_room_for_bytes(vocab_size):
    with pytest.raises(ConfigError, match=f"vocab_size={vocab_size}: .* at least 257"):
        Tokenizer.train_bpe(CORPUS, vocab_size)


@pytest.mark.parametrize("vocab_size", [2**32 + 1, 2**62, 10**40])
def test_bpe_refuses_more_ids_than_32_bits_have(vocab_size):
    with pytest.raises(ConfigError, match=r"vocab_size=.*: token ids have 32 bits"):
        Tokenizer.train_bpe(CORPUS, vocab_size)


def test_an_error_in_the_texts_reaches_the_caller():
    def texts():
        yield CORPUS[0]
        raise DataError("half-way")

    with pytest.raises(DataError, match="half-way"):
        Tokenizer.train_bpe(texts(), 300)


def test_characters_are_in_code_point_order_after_the_end_of_text():
    tokenizer = Tokenizer.characters(["cab", "\n🙂"])
    assert tokenizer.eot_id == 0
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("\nabc🙂") == [1, 2, 3, 4, 5]
    assert tokenizer.decode([1, 2, 3, 4, 5]) == "\nabc🙂"


@given(st.text(st.sampled_from("".join(CORPUS))))
def test_characters_round_trip(text):
    assert CHARACTERS.decode(CHARACTERS.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "special_tokens", "message"),
    [
        ("times 北 Ω?", False, r"'Ω' \(U\+03A9\) at character 8 is not in the vocabulary"),
        (f"t{END_OF_TEXT}\x01", True, r"'\\x01' \(U\+0001\) at character 14 is not"),
        ("times \ud800", False, r"\(U\+D800\) at character 6 is not"),
    ],
)
def test_characters_name_what_they_do_not_know(text, special_tokens, message):
    with pytest.raises(DataError, match=message):
        CHARACTERS.encode(text, special_tokens=special_tokens)


def test_characters_of_nothing_are_refused():
    with pytest.raises(DataError, match="empty"):
        Tokenizer.characters(["", ""])


def test_bpe_refuses_a_lone_surrogate():
    with pytest.raises(DataError, match=r"U\+DC80\) at character 3 is a lone surrogate"):
        BPE.encode("abc\udc80")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_file_means_the_same_to_the_library(kind, tmp_path):
    tokenizer = KINDS[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in CORPUS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert tokenizer.vocab_size == theirs.get_vocab_size()


def test_the_library_refuses_an_unknown_character_of_our_file(tmp_path):
    CHARACTERS.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Exception, match="WordLevel"):
        theirs.encode("Ω")


@pytest.mark.parametrize("tokenizer", [BPE, CHARACTERS], ids=["bpe", "characters"])
def test_special_tokens_are_plain_text_unless_asked(tokenizer):
    tokenizer = Tokenizer.characters([*CORPUS, END_OF_TEXT]) if tokenizer is CHARACTERS else tokenizer
    text = f"times{END_OF_TEXT}age"
    assert tokenizer.eot_id not in tokenizer.encode(text)
    ids = tokenizer.encode(text, special_tokens=True)
    assert ids == [*tokenizer.encode("times"), tokenizer.eot_id, *tokenizer.encode("age")]
    assert tokenizer.encode(text) != ids  # asking once changes nothing for later calls


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_the_sha256_of_the_file_and_survives_saving(kind, tmp_path):
    # as another program may lay it out: the file must be kept byte for byte
    foreign = tmp_path / "foreign.json"
    KINDS[kind].save(foreign)
    foreign.write_text(json.dumps(json.loads(foreign.read_text(encoding="utf-8")), indent=7, ensure_ascii=True))
    loaded = Tokenizer.load(foreign)
    loaded.save(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == foreign.read_bytes()
    assert loaded.fingerprint == hashlib.sha256(foreign.read_bytes()).hexdigest()
    assert Tokenizer.load(tmp_path / "copy.json").fingerprint == loaded.fingerprint


def test_load_ignores_padding_truncation_and_added_tokens_of_the_file(tmp_path):
    backend = tokenizers.Tokenizer.from_str(json.dumps(json.loads(BPE._definition)))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(CORPUS[0]) == BPE.encode(CORPUS[0])


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_load_gpt2_pair(names, tmp_path):
    model = tokenizers.Tokenizer.from_str(BPE._definition.decode()).model
    for made, name in zip(model.save(str(tmp_path), "made"), names, strict=True):
        (tmp_path / made).rename(tmp_path / name)
    theirs = tokenizers.ByteLevelBPETokenizer(*(str(tmp_path / name) for name in names))
    for path in (tmp_path, tmp_path / names[0]):
        tokenizer = Tokenizer.load(path)
        assert [tokenizer.encode(text) for text in CORPUS] == [theirs.encode(text).ids for text in CORPUS]
        assert tokenizer.eot_id == BPE.eot_id
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tokenizer.json: no such tokenizer"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    for damage in (b"", b"{}", BPE._definition[:-20], b"[1, 2]"):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json"):
            Tokenizer.load(path)
    path.write_bytes(b"{\xff}")
    with pytest.raises(DataError, match=r"byte 1 is not UTF-8"):
        Tokenizer.load(path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(DataError, match=r"vocab.json and merges.txt: not a byte-level BPE"):
        Tokenizer.load(tmp_path / "vocab.json")


@pytest.mark.parametrize("bad", [-1, BPE.vocab_size, 1 << 40])
def test_decode_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(DataError, match=f"token id {bad} is outside the vocabulary of {BPE.vocab_size}"):
        BPE.decode([5, bad])


@settings(deadline=None)
@given(data=st.data(), kind=st.sampled_from(["bpe", "characters"]))
def test_stream_pieces_join_to_the_whole(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "byte_fallback"])
@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab é北🙂👩\u0301")))
def test_stream_never_emits_half_a_character(kind, text):
    tokenizer = KINDS[kind]
    stream = tokenizer.stream()
    shown = ""
    for token in tokenizer.encode(text):
        piece = stream.push(token)
        assert "\ufffd" not in piece
        shown += piece
        assert tokenizer.decode(tokenizer.encode(text)).startswith(shown)
    assert stream.flush() == ""


def test_stream_emits_each_character_as_soon_as_it_is_whole():
    stream = Tokenizer.train_bpe(["x"], 257).stream()
    ids = Tokenizer.train_bpe(["x"], 257).encode("aé🙂")
    assert [stream.push(token) for token in ids] == ["a", "", "é", "", "", "", "🙂"]
    assert stream.push(ids[1]) == ""
    assert stream.flush() == "\ufffd"


def test_wordpiece_learns_words_with_letters_that_begin_none():
    text = "ab cab abc " * 40 + "cabs " * 30  # b and s go on words alone
    theirs = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    theirs.train_from_iterator([text], trainer)
    ours = Tokenizer.train_wordpiece([text], 60)
    for word in set(text.split()):
        assert len(ours.encode(word)) == len(theirs.encode(word).ids) == 1
