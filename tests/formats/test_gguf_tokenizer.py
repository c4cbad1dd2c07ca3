"""Tokenizers of GGUF files: the rules that llama.cpp has under each name, by hand, by regex and by transformers."""

import random
from itertools import pairwise

import pytest
import regex
import tokenizers

import fastlm
from fastlm.errors import CheckpointError, DataError
from fastlm.formats.gguf.tokenizer import RULES, load_tokenizer
from fastlm.models import Llama, LlamaConfig
from fastlm.models.common.generation import generation_of
from hf import perturbed, transformers

gguf = pytest.importorskip("gguf")

MERGES = ["Ġ t", "h e", "i s", "Ġ is", "1 2", "12 3", "3 4", "Ġ 1", "' l", "'l l", "Ċ Ċ", "l l"]
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(path, cut, kind="gpt2", extra=(), types=None, **fields):
    """A file with a byte-level BPE of a few merges in it; returns the tokens."""
    tokens = ["<|end|>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *extra]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if cut is not None:
        writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1 - len(extra)) + (types or [1] * len(extra)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for name, value in fields.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens


def greedy_merges(word, merges, tokens, whole=False):
    """Byte-pair encoding of one word as its paper has it: the earliest merge first, wherever it is."""
    if whole and word in tokens:
        return [tokens.index(word)]
    parts = list(word)
    while pairs := [pair for pair in pairwise(parts) if pair in merges]:
        first = min(pairs, key=merges.index)
        at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == first)
        parts[at : at + 2] = ["".join(first)]
    return [tokens.index(part) for part in parts]


# Of llama.cpp's src/llama-vocab.cpp at 00ad355: names, expressions, ignore_merges, add_bos.
SUFFIXES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORD, SIGNS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
          rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}")  # fmt: skip
GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIXES}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIXES}?"
         rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}")  # fmt: skip
LLAMA3 = rf"{SUFFIXES}|{WORD}|\p{{N}}{{1,3}}|{SIGNS}|{BLANKS}"
QWEN2 = rf"{SUFFIXES}|{WORD}|\p{{N}}|{SIGNS}|{BLANKS}"
QWEN35 = rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{BLANKS}"
KINDS = [
    ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais trillion "
     "granite-docling exaone4", [GPT2], False, False),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", [r"\p{N}", GPT2], False, False),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", [LLAMA3], True, True),
    ("dbrx smaug-bpe glm4 chatglm-bpe", [LLAMA3], False, False),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", [QWEN2], False, False),
    ("qwen35", [QWEN35], False, False),
    ("tekken", [TEKKEN], True, True),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", [GPT4O], False, False),
]  # fmt: skip
BY_NAME = {name: tuple(rest) for names, *rest in KINDS for name in names.split()}


def split(text, expressions):
    """Each expression cuts the pieces of the one before; what it does not match is a piece too."""
    pieces = [text]
    for expression in expressions:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def in_bytes(word):
    return BYTES.pre_tokenize_str(word)[0][0]


PARTS = ["the", "Hello", "IT'LL", "it's", "don'T", "été", "e\u0301", "世界", "🙂", "1234", "²", "٣٤", "x/y//", "?!",
         "...\n", " ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "'", "is", "hello", "CamelCase",
         "ABC", "ǅ"]  # fmt: skip


def test_the_names_that_are_claimed():
    assert RULES.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", BY_NAME)
def test_every_name_follows_its_rules(name, tmp_path):
    expressions, ignore_merges, add_bos = BY_NAME[name]
    tokens = write_tokenizer(tmp_path / "model.gguf", name, extra=["hello", "Ġhello", "ĠABC"])
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    draw = random.Random(name)
    for text in ["hello hello", *("".join(draw.choices(PARTS, k=12)) for _ in range(25))]:
        words = [in_bytes(word) for word in split(text, expressions)]
        expected = [token for word in words for token in greedy_merges(word, merges, tokens, ignore_merges)]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text
    assert len(tokenizer.encode("hello")) == (1 if ignore_merges else 3)  # he ll o
    assert tokenizer.start_ids == ([0] if add_bos else [])


WORDS = {  # of "The is 1234 it'll\n\n is", as the patterns cut it that llama.cpp knows under these names
    "gpt-2": ["The", "Ġis", "Ġ1234", "Ġit", "'ll", "ĊĊ", "Ġis"],
    "smollm": ["The", "Ġis", "Ġ", "1", "2", "3", "4", "Ġit", "'ll", "ĊĊ", "Ġis"],
    "llama-bpe": ["The", "Ġis", "Ġ", "123", "4", "Ġit", "'ll", "ĊĊ", "Ġis"],
    "qwen2": ["The", "Ġis", "Ġ", "1", "2", "3", "4", "Ġit", "'ll", "ĊĊ", "Ġis"],
    "tekken": ["The", "Ġis", "Ġ", "1", "2", "3", "4", "Ġit", "'ll", "ĊĊ", "Ġis"],
    "gpt-4o": ["The", "Ġis", "Ġ", "123", "4", "Ġit'll", "ĊĊ", "Ġis"],
}


@pytest.mark.parametrize("cut", WORDS)
def test_gguf_tokenizer(cut, tmp_path):
    tokens = write_tokenizer(tmp_path / "model.gguf", cut, add_add_bos_token=cut == "llama-bpe")
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    whole = cut in ("llama-bpe", "tekken")
    expected = [index for word in WORDS[cut] for index in greedy_merges(word, merges, tokens, whole)]
    text = "The is 1234 it'll\n\n is"
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.eot_id == 0
    assert tokenizer.start_ids == ([0] if cut == "llama-bpe" else [])
    assert tokenizer.encode("<|end|>", special_tokens=True) == [0]
    assert tokenizer.decode(tokenizer.encode("été 世🙂 <|end|>")) == "été 世🙂 <|end|>"


@pytest.mark.parametrize(("cut", "family"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_equals_transformers_tokenizer_of_the_family(cut, family, tmp_path):
    tokens = write_tokenizer(tmp_path / "model.gguf", cut)
    ours = load_tokenizer(tmp_path / "model.gguf")
    theirs = getattr(transformers, family)(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
        unk_token="<|end|>", bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>",
    )  # fmt: skip
    draw = random.Random(0)
    composed = [part for part in PARTS if part != "e\u0301"]  # Qwen2's tokenizer.json normalises, llama.cpp does not
    for _ in range(50):
        text = "".join(draw.choices(composed, k=12))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_tokens_that_a_user_added_are_found_in_text_and_control_tokens_are_not(tmp_path):
    extra = ["<tool>", "<ctrl>", "<|im_end|>"]
    tokens = write_tokenizer(tmp_path / "model.gguf", "gpt-2", extra=extra, types=[4, 3, 1])
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    tool, control, end = (tokens.index(token) for token in extra)
    assert tokenizer.encode("is<tool>is") == [*tokenizer.encode("is"), tool, *tokenizer.encode("is")]
    for name, index in (("<ctrl>", control), ("<|im_end|>", end)):
        assert index not in tokenizer.encode(f"is{name}is")
        assert tokenizer.encode(name, special_tokens=True) == [index]


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({}, []),
        ({"add_add_bos_token": True}, [1]),
        ({"add_add_eos_token": True}, [2]),
        ({"add_add_bos_token": True, "add_add_eos_token": True}, [1, 2]),
    ],
    ids=str,
)
def test_a_file_says_what_begins_and_ends_a_text(fields, ids, tmp_path):
    write_tokenizer(tmp_path / "model.gguf", "qwen2", add_bos_token_id=1, add_eos_token_id=2, **fields)
    load_tokenizer(tmp_path / "model.gguf").save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = backend.encode("is", add_special_tokens=False).ids
    around = backend.encode("is").ids
    assert around == [i for i in ids if i == 1] + plain + [i for i in ids if i == 2]


@pytest.mark.parametrize(
    ("kind", "cut"),
    [("llama", "default"), ("gpt2", "falcon"), ("gpt2", "default"), ("gpt2", "deepseek-llm"), ("gpt2", None)],
)
def test_gguf_tokenizers_that_are_not_known(kind, cut, tmp_path):
    write_tokenizer(tmp_path / "model.gguf", cut, kind)
    with pytest.raises(DataError, match=f"its tokenizer is {kind} {cut}, expected gpt2 .* put the model's tokenizer"):
        load_tokenizer(tmp_path / "model.gguf")


def test_a_token_that_is_there_twice_is_refused(tmp_path):
    write_tokenizer(tmp_path / "model.gguf", "gpt-2", extra=["is"])
    with pytest.raises(CheckpointError, match=r"its tokenizer is damaged: .*two tokens are 'is'"):
        load_tokenizer(tmp_path / "model.gguf")


# Ends and sampling


def write_model(path, tokens, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    c = LlamaConfig(len(tokens), 16, 1, 2, 8, 12)
    for name, value in (("context_length", c.context_length), ("embedding_length", c.n_embd), ("block_count", 1),
                        ("feed_forward_length", c.n_inner), ("head_count", c.n_head),
                        ("layer_norm_rms_eps", c.rms_norm_eps)):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    for name, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        writer.add_array(name, value) if isinstance(value, list) else add(name, value)
    model = perturbed(Llama(c))
    layer = model.layers[0]
    tensors = {"token_embd": model.wte, "output_norm": model.norm, "output": model.lm_head,
               "blk.0.attn_norm": layer.attention_norm, "blk.0.ffn_norm": layer.mlp_norm,
               "blk.0.attn_output": layer.attention.out, "blk.0.ffn_down": layer.mlp.down}  # fmt: skip
    arrays = {name: module.weight for name, module in tensors.items()}
    for names, stacked in (("attn_q attn_k attn_v", layer.attention.qkv), ("ffn_gate ffn_up", layer.mlp.gate_up)):
        parts = names.split()
        pieces = stacked.weight.chunk(len(parts))
        arrays |= {f"blk.0.{part}": piece for part, piece in zip(parts, pieces, strict=True)}
    for name, weight in arrays.items():
        writer.add_tensor(f"{name}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("tokens", "fields", "ends"),
    [
        (["a", "b", "c", "d"], {"eos": 2}, 2),
        (["a", "b", "c", "d"], {"eos": 2, "eot": 1, "eom": 3}, [2, 1, 3]),
        (["a", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], {"eos": 2}, [2, 1, 3]),
        (["<|im_end|>", "b", "<|endoftext|>"], {"eos": 0}, [0, 2]),
        (["a", "b"], {}, None),
        (["a", "b"], {"eos": 7}, None),
        (["a", "<|end|>", "<|return|>", "<|call|>"], {"eos": 2}, [2, 3]),
    ],
)
def test_a_file_ends_where_llama_cpp_does(tokens, fields, ends, tmp_path):
    write_model(tmp_path / "m.gguf", tokens, **{f"tokenizer.ggml.{name}_token_id": i for name, i in fields.items()})
    model = fastlm.load(tmp_path / "m.gguf")
    assert generation_of(model).said.get("eos_token_id") == ends
    fastlm.save(model, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert theirs.eos_token_id == ends


def test_a_file_says_how_it_would_be_sampled(tmp_path):
    sampling = {"general.sampling.temp": 0.5, "general.sampling.top_k": 7, "general.sampling.penalty_repeat": 1.25}
    write_model(tmp_path / "m.gguf", ["a", "b", "c"], **sampling, **{"tokenizer.ggml.suppress_tokens": [1]})
    settings = generation_of(fastlm.load(tmp_path / "m.gguf")).settings
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.5, 7)
    assert (settings.repetition_penalty, settings.suppress_tokens) == (1.25, (1,))
