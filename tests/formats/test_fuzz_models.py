"""Everything that a model is read from, damaged at random: it is loaded, or refused in one line that names the file."""

import copy
import json
import random
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastlm
from fastlm._core.tensor_file import open_safetensors
from fastlm.data import Tokenizer
from fastlm.errors import CheckpointError, FastlmError
from fastlm.formats.gguf.tokenizer import load_tokenizer
from fastlm.inference import quantize
from fastlm.models import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    Phi3,
    Phi3Config,
    Qwen3,
    Qwen3Config,
    Seq2Seq,
    Seq2SeqConfig,
)
from formats.test_gguf_tokenizer import write_tokenizer
from formats.test_load_save import write_gguf
from fuzz import INPUTS

resource = pytest.importorskip("resource", reason="the bound on memory is POSIX's")

MEMORY = 2**30  # bytes of address space that reading a file of a few thousand may take
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 100_000, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "1", "F64", "I32", "llama", "a\nb", "\ud800", "..", "a" * 3000, [], [1], [[[]]], {},
    {"a": 1},
]  # fmt: skip
MODELS = {
    "gpt2": lambda: GPT(GPTConfig(11, 8, 1, 2, 4)),
    "bert": lambda: BERT(BERTConfig(11, 8, 1, 2, 4, head="pretraining", pooler=True)),
    "llama": lambda: Llama(LlamaConfig(11, 8, 1, 2, 4, 8, rope_scaling="llama3", rope_factor=8.0)),
    "qwen2": lambda: Llama(LlamaConfig(11, 8, 1, 2, 4, 8, qkv_bias=True, sliding_window=4)),
    "marian": lambda: Seq2Seq(Seq2SeqConfig(11, 8, 1, 1, 2, 4)),
    "qwen3": lambda: Qwen3(Qwen3Config(11, 8, 1, 2, 4, 8, head_size=4, sliding_window=4)),
    "phi3": lambda: Phi3(
        Phi3Config(11, 8, 1, 2, 8, 8, rope_scaling="longrope", rope_short_factors=(1, 2), rope_long_factors=(1, 3))
    ),
}


def damaged(original: bytes, random: random.Random, end: int | None = None) -> bytes:
    """Bits flipped, blocks cut, zeroed, filled or doubled, or the end lost, within the first `end` bytes."""
    data = bytearray(original)
    for _ in range(random.choice((1, 1, 1, 3))):
        at, size = random.randrange(min(len(data), end or len(data)) or 1), random.choice((1, 1, 2, 4, 8, 64))
        block = data[at : at + size]
        kind = random.randrange(7)
        if kind == 0 and block:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + size] = bytes(len(block))
        elif kind == 2:
            data[at : at + size] = b"\xff" * len(block)
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = block
        elif kind == 5:
            data[at : at + size] = random.randbytes(len(block))
        elif random.random() < 0.3:
            del data[at:]
    return bytes(data)


def altered(value, random: random.Random):
    """A copy of a JSON value with up to three of its values replaced, dropped or nested too deeply."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return value
        holder, key = random.choice(places)
        kind = random.randrange(10)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1:
            for _ in range(random.choice((3, 150))):
                holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(random.choice(ODD))
    return value


def _places(value):
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def altered_text(text: bytes, random: random.Random) -> bytes:
    """A JSON text with another value, or damaged as any file is."""
    if random.random() < 0.25:
        return damaged(text, random)
    return json.dumps(altered(json.loads(text), random), ensure_ascii=random.random() < 0.9).encode(errors="replace")


def altered_safetensors(data: bytes, random: random.Random) -> bytes:
    """A safetensors file with another header, or with other settings inside its metadata, or damaged."""
    length = int.from_bytes(data[:8], "little")
    kind = random.random()
    if kind < 0.3:
        return damaged(data, random, 8 + length + 64)
    header = json.loads(data[8 : 8 + length])
    inside = header.get("__metadata__", {})
    if kind < 0.7 and len(inside) > 1:
        name = random.choice(list(inside))
        inside[name] = altered_text(json.dumps(_parsed(inside[name])).encode(), random).decode(errors="replace")
    else:
        header = altered(header, random)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.fixture(autouse=True)
def bounds():
    """One thread, and no more memory than a reader of small files needs; an input that hangs is interrupted."""

    def interrupt(*_):
        raise TimeoutError("hangs")

    threads, limits = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, interrupt)
    torch.set_num_threads(1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    torch.set_num_threads(threads)


def limit_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = pages * resource.getpagesize() + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def fuzz(path, alter, load, count=INPUTS):
    """Load `count` alterations of the file at `path`; returns how many were loaded and how many refused."""
    original, generator = path.read_bytes(), random.Random(0)
    load()  # what is loaded once, such as packages, is not of the file
    if Path("/proc/self/statm").exists():
        limit_memory()
    loaded = 0
    for number in range(count):
        path.write_bytes(alter(original, generator))
        signal.setitimer(signal.ITIMER_REAL, 60)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*loaded untied")  # a folder may be altered into one
                load()
            loaded += 1
        except FastlmError as error:
            text = str(error)
            assert str(path) in text or str(path.parent) in text, text
            assert "\n" not in text, text
        except BaseException as error:
            raise AssertionError(f"input {number} of {path.name}: {type(error).__name__}: {error}") from error
        signal.setitimer(signal.ITIMER_REAL, 0)
    # A fuzzer of which everything, or nothing, is refused shows nothing.
    assert count // 50 < loaded < count - count // 20
    return loaded


@pytest.mark.parametrize("name", MODELS)
def test_config_json(name, tmp_path):
    fastlm.save(MODELS[name](), tmp_path)
    fuzz(tmp_path / "config.json", altered_text, lambda: fastlm.load(tmp_path), INPUTS // 2)


def test_safetensors_of_a_folder(tmp_path):
    fastlm.save(MODELS["gpt2"](), tmp_path)
    alter = lambda data, random: altered_safetensors(data, random) if random.random() < 0.9 else data[:-1] + b"\0"  # noqa: E731
    fuzz(tmp_path / "model.safetensors", alter, lambda: fastlm.load(tmp_path))


def test_generation_config(tmp_path):
    fastlm.save(MODELS["gpt2"](), tmp_path)
    said = {"eos_token_id": [1, 2], "bos_token_id": 1, "do_sample": True, "temperature": 0.7, "max_new_tokens": 5,
            "early_stopping": "never", "bad_words_ids": [[1], [2, 3]], "sequence_bias": [[[1], 0.5]],
            "exponential_decay_length_penalty": [3, 1.1]}  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    fuzz(tmp_path / "generation_config.json", altered_text, lambda: fastlm.load(tmp_path))


def test_index_of_shards(tmp_path):
    fastlm.save(MODELS["llama"](), tmp_path, shard_bytes=900)
    fuzz(tmp_path / "model.safetensors.index.json", altered_text, lambda: fastlm.load(tmp_path))


def test_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    fastlm.save(MODELS["gpt2"](), path, format="fastlm")
    fuzz(path, altered_safetensors, lambda: fastlm.load(path))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized(scheme, tmp_path):
    path = tmp_path / "model.safetensors"
    fastlm.save(quantize(MODELS["llama"](), scheme), path, format="fastlm")
    fuzz(path, altered_safetensors, lambda: fastlm.load(path), INPUTS // 2)


def test_pickle(tmp_path):
    fastlm.save(MODELS["gpt2"](), tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(load_file(tmp_path / "model.safetensors"), path)
    (tmp_path / "model.safetensors").unlink()
    fuzz(path, damaged, lambda: fastlm.load(tmp_path))


GGUF_MODELS = {
    "llama": lambda: Llama(LlamaConfig(11, 8, 1, 2, 32, 32)),
    "qwen3": lambda: Qwen3(Qwen3Config(11, 8, 1, 2, 32, 32, head_size=16)),
    "phi3": lambda: Phi3(
        Phi3Config(11, 8, 1, 2, 32, 32, rotary_share=0.25, rope_scaling="longrope", rope_short_factors=(1, 2),
                   rope_long_factors=(1, 3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUF_MODELS)
def test_gguf(kind, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(GGUF_MODELS[kind](), path, "Q8_0", kind)
    header = path.read_bytes().index(b"output_norm") + 200
    count = INPUTS if kind == "llama" else INPUTS // 2
    fuzz(path, lambda data, random: damaged(data, random, header), lambda: fastlm.load(path), count)


def test_tokenizer_of_a_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_tokenizer(path, "llama-bpe", add_add_bos_token=True)

    def load():
        tokenizer = load_tokenizer(path)
        if tokenizer.eot_id is not None:
            tokenizer.decode([tokenizer.eot_id])

    fuzz(path, damaged, load)


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_tokenizer_json(kind, tmp_path):
    text = "the quick brown fox, the quick"
    (Tokenizer.characters([text]) if kind == "characters" else Tokenizer.train_bpe([text] * 3, 262)).save(
        tmp_path / "tokenizer.json"
    )
    fuzz(tmp_path / "tokenizer.json", altered_text, lambda: Tokenizer.load(tmp_path))


# What chance does not find


def number(value, size=8):
    return value.to_bytes(size, "little")


def gguf_file(fields=(), tensors=(), counts=None, data=b""):
    """A header from (name, type, bytes of the value) and (name, extents, type, offset)."""
    text = lambda name: number(len(name)) + name.encode()  # noqa: E731
    body = b"".join(text(name) + number(kind, 4) + value for name, kind, value in fields)
    for name, extents, kind, offset in tensors:
        body += text(name) + number(len(extents), 4) + b"".join(map(number, extents)) + number(kind, 4) + number(offset)
    counted = counts or (len(tensors), len(fields))
    header = b"GGUF" + number(3, 4) + number(counted[0]) + number(counted[1]) + body
    return header + bytes(-len(header) % 32) + data


HUGE = 2**62
GGUFS = {
    "tensors": (gguf_file(counts=(HUGE, 0)), f"{HUGE} tensors at byte 24, where"),
    "settings": (gguf_file(counts=(0, HUGE)), f"{HUGE} settings at byte 24, where"),
    "a text": (gguf_file([("a", 8, number(HUGE))]), f"{HUGE} characters at byte"),
    "a name": (gguf_file(counts=(0, 1))[:24] + number(HUGE) + bytes(64), f"{HUGE} characters at byte"),
    "numbers": (gguf_file([("a", 9, number(0, 4) + number(HUGE))]), f"{HUGE} numbers of 1 bytes"),
    "texts": (gguf_file([("a", 9, number(8, 4) + number(HUGE))]), f"{HUGE} texts at byte"),
    "nested arrays": (gguf_file([("a", 9, number(9, 4) + number(1))]), "an array of the unknown type 9"),
    "a type": (gguf_file([("a", 13, b"")]), "a is of the unknown type 13"),
    "twice": (gguf_file([("a", 0, b"\0"), ("a", 0, b"\0")]), "a is there twice"),
    "not UTF-8": (gguf_file([("a", 8, number(1) + b"\xff")]), "is not UTF-8"),
    "alignment": (gguf_file([("general.alignment", 4, number(3, 4))]), "general.alignment is 3, expected a power of"),
    "extents": (gguf_file(tensors=[("a", (HUGE, HUGE), 0, 0)]), f"its header promises {96 + 4 * HUGE * HUGE}"),
    "no data": (gguf_file(tensors=[("a", (64,), 0, 0)]), "has 64 bytes, its header promises 320"),
    "rank": (gguf_file(tensors=[("a", (1,) * 5, 0, 0)]), "a has 5 dimensions"),
    "offset": (gguf_file(tensors=[("a", (8,), 0, 32)], data=bytes(64)), "begins at byte 32 of the data, expected 0"),
    "weights' type": (gguf_file(tensors=[("a", (8,), 999, 0)], data=bytes(64)), "a is of the unknown type 999"),
    "rows": (gguf_file(tensors=[("a", (8,), 8, 0)], data=bytes(64)), "rows of a multiple of 32 for Q8_0"),
    "big-endian": (b"GGUF" + bytes((0, 0, 0, 3)) + bytes(64), "version is 50331648, expected 2 or 3, little-endian"),
    "empty": (b"", "it is empty"),
    "another file": (b"\x7fELF" + bytes(64), "does not begin with GGUF"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_counts_of_a_gguf_are_compared_with_the_file(name, tmp_path):
    content, message = GGUFS[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    limit_memory()
    with pytest.raises(CheckpointError, match=f"^{path}: cut short or not a GGUF file: .*") as caught:
        fastlm.load(path)
    assert message in str(caught.value)


def a_header(**entries):
    text = json.dumps(entries).encode()
    return number(len(text)) + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "length": (number(HUGE) + bytes(16), "24 bytes are less than its header's length says"),
    "short": (b"abc", "3 bytes are less than"),
    "no JSON": (number(4) + b"\xff{}{", "its header is not JSON"),
    "deep": (number(200_000) + b"[" * 200_000, "its header is not JSON"),
    "a list": (number(2) + b"[]", "not a JSON object"),
    "metadata": (a_header(__metadata__={"a": 1}), "metadata of strings"),
    "an entry": (a_header(a=[1]) + bytes(8), "entry for a is not dtype, shape and data_offsets"),
    "dtype": (a_header(a=entry("F31")) + bytes(8), "a has dtype 'F31', expected one of"),
    "shape": (a_header(a=entry(shape=(-2,))) + bytes(8), r"a has shape \[-2\]"),
    "boolean": (a_header(a=entry(shape=(True, 2))) + bytes(8), "a has shape"),
    "beyond 64 bits": (a_header(a=entry(shape=(2**64,))) + bytes(8), "a has shape"),
    "overflow": (a_header(a=entry(shape=(2**62, 4))) + bytes(8), "beyond 64 bits"),
    "empty overflow": (a_header(a=entry(shape=(0, 2**40, 2**40), offsets=(0, 0))), "beyond 64 bits"),
    "more than there is": (a_header(a=entry(shape=(2**40,))) + bytes(8), "takes 4398046511104 bytes"),
    "rank": (a_header(a=entry(shape=(1,) * 65, offsets=(0, 4))) + bytes(4), "up to 64 extents"),
    "size": (a_header(a=entry(shape=(3,))) + bytes(8), "takes 12 bytes, its data_offsets are"),
    "a hole": (a_header(a=entry(offsets=(4, 12))) + bytes(12), "begins at byte 4 of the data, expected 0"),
    "overlap": (a_header(a=entry(), b=entry(offsets=(4, 12))) + bytes(12), "b begins at byte 4 .*, expected 8"),
    "cut": (a_header(a=entry()) + bytes(7), "its header promises"),
    "more": (a_header(a=entry()) + bytes(9), "its header promises"),
    "a name": (a_header(**{"a\nb": entry()}) + bytes(8), "a tensor is called"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors_are_compared_with_the_file(name, tmp_path):
    content, message = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: cut short or not a safetensors file: .*{message}"):
        open_safetensors(path)


def test_reads_what_the_library_writes(tmp_path):
    tensors = {f"a.{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16,
               torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)}  # fmt: skip
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "x", {"some": "text"})
    file = open_safetensors(tmp_path / "x")
    assert file.metadata == {"some": "text"}
    for name, tensor in tensors.items():
        read = file.tensors[name].read(None)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        file.tensors["scalar"].read(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": "x"}, 'rope_theta is "x", expected a number'),
        ({"rope_theta": 10**400}, "rope_theta is an integer of 1329 bits, expected a finite number"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"missing rope_scaling\.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"missing rope_scaling\.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [2]}}, r"rope_scaling\.factor is \[2\], expected a number"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear", expected an object'),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"attention_bias": "no"}, 'attention_bias is "no", expected true or false'),
        ({"num_hidden_layers": None}, "num_hidden_layers is null, expected an integer"),
        ({"num_hidden_layers": 2**64}, "expected one of 64 bits"),
        ({"num_hidden_layers": 100_000}, r"n_layer is 100000, but there are only \d+ tensors"),
        ({"hidden_size": 2**40}, "n_embd is 1099511627776, expected an integer of at most 2147483647"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer"),
        ({"hidden_size": 2**30, "vocab_size": 2**31 - 1, "head_dim": 2**30}, "its sizes are too large|has shape"),
        ({"sliding_window": "wide", "model_type": "mistral"}, 'sliding_window is "wide", expected an integer'),
        ({"model_type": ["llama"]}, r'model_type is \["llama"\], expected'),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number above 0"),
    ],
)
def test_settings_of_a_llama_that_are_not_what_they_should_be(changes, message, tmp_path):
    fastlm.save(Llama(LlamaConfig(11, 8, 1, 2, 4, 8)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"^{path}: .*({message})"):
        fastlm.load(tmp_path)
