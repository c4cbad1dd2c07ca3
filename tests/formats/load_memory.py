"""What loading takes: one copy of the weights and a tensor or two, and nothing for what a file only claims."""

import ctypes
import gc
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastlm
from fastlm.errors import CheckpointError
from fastlm.inference import quantize
from fastlm.models import BERT, GPT, BERTConfig, GPTConfig, Llama, LlamaConfig, Seq2Seq, Seq2SeqConfig
from formats.test_load_save import write_gguf

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def resident(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


@pytest.fixture
def peak():
    """Runs a function and returns the bytes by which it raised the process's resident memory, pages of files
    included."""
    if not (STATUS.exists() and RESET.exists() and "VmHWM" in STATUS.read_text()):
        pytest.skip("the system does not tell a process's largest resident memory")

    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)

    def measure(function):
        gc.collect()
        trim(0)  # what the allocator keeps would be used again unseen
        try:
            RESET.write_text("5")
        except OSError as error:
            pytest.skip(f"the peak cannot be reset: {error}")
        before = resident("VmRSS")
        result = function()
        return resident("VmHWM") - before, result

    return measure


MODELS = {
    "GPT": lambda: GPT(GPTConfig(2000, 512, 4, 12, 768)),
    "Llama": lambda: Llama(LlamaConfig(2000, 512, 3, 12, 768, 2048, n_kv_head=4)),
    "BERT": lambda: BERT(BERTConfig(2000, 512, 4, 12, 768)),
    "Seq2Seq": lambda: Seq2Seq(Seq2SeqConfig(2000, 512, 2, 2, 12, 768)),
}
TINY = {
    "GPT": lambda: GPT(GPTConfig(20, 8, 1, 2, 16)),
    "Llama": lambda: Llama(LlamaConfig(20, 8, 1, 2, 32, 32)),
    "BERT": lambda: BERT(BERTConfig(20, 8, 1, 2, 16)),
    "Seq2Seq": lambda: Seq2Seq(Seq2SeqConfig(20, 8, 1, 1, 2, 16)),
}
FORMATS = [(name, form) for name in MODELS for form in ("hf", "fastlm")]
FORMATS += [("GPT", "bf16"), ("Llama", "shards"), ("Llama", "gguf"), ("Llama", "gguf-Q8_0"), ("Llama", "pickle")]
FORMATS += [("GPT", "quantized"), ("Llama", "fastlm-bf16")]


def write(model, form, folder):
    if form.startswith("gguf"):
        folder.mkdir()
        write_gguf(model, folder / "model.gguf", form.partition("-")[2] or "F32")
    elif form == "quantized":
        fastlm.save(quantize(model), folder, format="fastlm")
    elif form.startswith("fastlm"):
        fastlm.save(model.bfloat16() if form.endswith("bf16") else model, folder, format="fastlm")
    else:
        shard = 20_000_000 if form == "shards" else 10**9
        fastlm.save(model.bfloat16() if form == "bf16" else model, folder, shard_bytes=shard)
    if form == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(("name", "form"), FORMATS, ids=["-".join(case) for case in FORMATS])
def test_loading_takes_one_copy_of_the_weights(name, form, tmp_path, peak):
    write(TINY[name](), form, tmp_path / "tiny")
    write(MODELS[name](), form, tmp_path / "large")
    fastlm.load(tmp_path / "tiny")  # what is imported once
    taken, model = peak(lambda: fastlm.load(tmp_path / "large"))
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    # Beside the copy: a tensor of the file, and what dequantizing a block of rows takes; a second copy is 60 MiB and
    # more. A pickle is mapped, so that its pages count until it is let go; a checkpoint is read whole, then widened.
    mapped = {"pickle": 1.0, "fastlm-bf16": 0.5}.get(form, 0.0)
    assert sum(sizes) > 25 * MIB
    assert taken < (1 + mapped) * sum(sizes) + max(sizes) + 12 * MIB, f"{taken / MIB:.0f} of {sum(sizes) / MIB:.0f} MiB"
    if form != "quantized":
        assert taken > 0.8 * sum(sizes)  # the measure is one


CLAIMS = {"n_layer": 10**5, "n_head": 2**20, "n_embd": 2**30, "vocab_size": 2**31 - 1, "context_length": 2**31 - 1}
THEIRS = {
    "GPT": {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "context_length": "n_positions"},
    "Llama": {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"},
    "BERT": {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "context_length": "max_position_embeddings"},
    "Seq2Seq": {
        "n_encoder_layer": "encoder_layers",
        "n_decoder_layer": "decoder_layers",
        "n_head": "encoder_attention_heads",
        "n_embd": "d_model",
    },
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", ["hf", "fastlm", "gguf", "quantized"])
def test_what_a_file_claims_costs_nothing(form, name, claim, tmp_path, peak):
    """A hundred thousand layers without weights would take a gigabyte; a matrix of the others, more than there is."""
    if form == "gguf" and name != "Llama":
        pytest.skip("GGUF is read of Llama types")
    if claim == "context_length" and name in ("Llama", "Seq2Seq"):
        pytest.skip("no tensor has this extent")
    write(TINY[name](), form, tmp_path / "model")
    changed = {claim: CLAIMS[claim]}
    if claim == "n_layer" and name == "Seq2Seq":
        changed = dict.fromkeys(("n_encoder_layer", "n_decoder_layer"), CLAIMS[claim])
    if claim == "n_head":  # a divisor of both
        changed["n_embd"] = 2**22
    if form == "gguf":
        edit_gguf(tmp_path / "model" / "model.gguf", changed)
    elif form == "hf":
        path = tmp_path / "model" / "config.json"
        theirs = {THEIRS[name].get(key, key): value for key, value in changed.items()}
        path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    else:
        edit_metadata(next((tmp_path / "model").glob("*.safetensors")), changed)

    def refused():
        with pytest.raises(CheckpointError) as caught:
            fastlm.load(tmp_path / "model")
        return str(caught.value)

    refused()
    taken, message = peak(refused)
    assert taken < 8 * MIB
    assert str(tmp_path / "model") in message
    assert "\n" not in message


def edit_metadata(path, changes):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = "config" if "config" in header["__metadata__"] else "model_config"
    header["__metadata__"][key] = json.dumps(json.loads(header["__metadata__"][key]) | changes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_gguf(path, changes):
    names = {
        "n_layer": "llama.block_count",
        "n_head": "llama.attention.head_count",
        "n_embd": "llama.embedding_length",
        "context_length": "llama.context_length",
    }
    data = bytearray(path.read_bytes())
    for key, value in changes.items():
        if key in names:
            name = names[key].encode()
            at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4
            data[at : at + 4] = value.to_bytes(4, "little")
        else:  # the vocabulary is an extent of the embedding
            at = data.index(b"token_embd.weight") + 17 + 4 + 8
            data[at : at + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)
