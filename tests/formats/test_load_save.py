"""fastlm.load and fastlm.save: every format in, two formats out, and files that are not what they should be."""

import dataclasses
import json
import os
import pickle
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune

import fastlm
import fastlm.data
from fastlm.cli import main as cli
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.checkpoint import save_checkpoint
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
from fastlm.models.llama import rotary_frequencies
from hf import CLOSE, perturbed, reload_as_theirs, transformers

MODELS = {
    "GPT": lambda: GPT(GPTConfig(61, 24, 2, 2, 16)),
    "BERT": lambda: BERT(BERTConfig(61, 24, 2, 2, 16)),
    "Llama": lambda: Llama(LlamaConfig(61, 24, 2, 4, 16, 40, n_kv_head=2)),
    "Seq2Seq": lambda: Seq2Seq(Seq2SeqConfig(61, 24, 2, 2, 2, 16, output_bias=True)),
    "Qwen3": lambda: Qwen3(Qwen3Config(61, 24, 2, 4, 16, 40, n_kv_head=2, head_size=8)),
    "Phi3": lambda: Phi3(
        Phi3Config(61, 24, 2, 4, 16, 40, rope_scaling="longrope", rope_short_factors=(1, 2.5), rope_long_factors=(1, 3))
    ),
}
GPT2_FOLDER_FILES = {"config.json", "model.safetensors"}


def a_model(name="GPT"):
    torch.manual_seed(0)
    return perturbed(MODELS[name]())


def assert_same(model, other):
    assert type(model) is type(other)
    assert model.config == other.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.fixture
def folder(tmp_path):
    """A Llama's folder of two shards."""
    path = tmp_path / "llama"
    fastlm.save(a_model("Llama"), path, shard_bytes=15_000)
    assert len(list(path.glob("model-*.safetensors"))) == 2
    return path


@pytest.mark.parametrize("format", ["hf", "fastlm"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, format, tmp_path):
    model = a_model(name)
    fastlm.save(model, tmp_path / "deep" / "new", format=format)
    again = fastlm.load(tmp_path / "deep" / "new")
    assert_same(model, again)
    assert again.config.family in (model.config.family, *([] if model.config.family else model.config.families))
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


FAMILIES = {  # whose relatives share a class, and could be told from each other by chance alone
    "mistral": ("Mistral", {"sliding_window": None}),
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1, "max_position_embeddings": 26}),
    "roberta": ("Roberta", {"pad_token_id": 1, "max_position_embeddings": 26}),
}


@pytest.mark.parametrize("again", ["hf", "fastlm", "quantized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_remembers_its_family(family, again, tmp_path):
    name, changes = FAMILIES[family]
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}  # fmt: skip
    head = "ForMaskedLM" if "oberta" in name.lower() else "ForCausalLM"
    theirs = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**(sizes | changes))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = fastlm.load(tmp_path / "theirs")
    assert model.config.family == family
    kept = fastlm.quantize(fastlm.load(tmp_path / "theirs")) if again == "quantized" else model
    fastlm.save(kept, tmp_path / "kept", "hf" if again == "hf" else "fastlm")
    kept = fastlm.load(tmp_path / "kept")
    assert (kept.config, kept.config.family) == (model.config, family)
    if again != "quantized":
        fastlm.save(kept, tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == family
        tokens = torch.arange(3, 20)[None]
        reloaded = reload_as_theirs(type(theirs), tmp_path / "again")
        torch.testing.assert_close(reloaded(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "family"),
    [({}, "llama"), ({"sliding_window": 5}, "mistral"), ({"qkv_bias": True}, "qwen2"),
     ({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, "llama"),
     ({"qkv_bias": True, "sliding_window": 4, "first_window_layer": 1}, "qwen2")],
)  # fmt: skip
def test_a_checkpoint_from_before_families_is_written_as_the_one_that_can_express_it(changes, family, tmp_path):
    model = Llama(LlamaConfig(61, 24, 2, 4, 16, 40, **changes))
    settings = {name: value for name, value in model.config.to_dict().items() if name != "family"}
    object.__setattr__(model.config, "to_dict", lambda: settings)
    save_checkpoint(tmp_path / "best.safetensors", model, state={"model": "Llama"})
    loaded = fastlm.load(tmp_path)
    assert loaded.config.family is None
    fastlm.save(loaded, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == family


def test_a_relative_that_was_changed_into_another_is_saved_as_that(tmp_path):
    config = LlamaConfig(61, 24, 2, 4, 16, 40, family="llama")
    model = Llama(dataclasses.replace(config, sliding_window=7))
    fastlm.save(model, tmp_path)
    assert fastlm.load(tmp_path).config.family == "mistral"


def test_a_family_that_is_not_known_is_refused(tmp_path):
    model = a_model("Llama")
    object.__setattr__(model.config, "family", "gemma")
    save_checkpoint(tmp_path / "best.safetensors", model, state={"model": "Llama"})
    with pytest.raises(CheckpointError, match="family is 'gemma', expected None or llama or mistral or qwen2"):
        fastlm.load(tmp_path)


def test_loads_a_checkpoint_of_training(tmp_path):
    model = a_model()
    save_checkpoint(tmp_path / "last.safetensors", model)
    assert_same(fastlm.load(tmp_path), model)
    other = perturbed(a_model(), seed=5)
    save_checkpoint(tmp_path / "best.safetensors", other)
    assert_same(fastlm.load(tmp_path), other)
    assert_same(fastlm.load(tmp_path / "last.safetensors"), model)


def test_dtype_and_dropout(tmp_path):
    fastlm.save(a_model("BERT"), tmp_path)
    model = fastlm.load(tmp_path, dropout=0.4, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dropout == model.config.attention_dropout == 0.4
    fastlm.save(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "half" / "model.safetensors")["bert.embeddings.LayerNorm.bias"].dtype == torch.bfloat16


def test_transformers_loads_our_shards(folder):
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(fastlm.load(folder)(tokens), theirs(tokens).logits, **CLOSE)
    sizes = [path.stat().st_size for path in folder.glob("model-*")]
    assert max(sizes) < 15_000 + 4_000  # the limit is for tensors; the rest is the header


def test_saving_again_leaves_the_files_of_the_new_model_alone(folder):
    (folder / "tokenizer.json").write_text("{}")
    fastlm.save(a_model("GPT"), folder)
    assert {path.name for path in folder.iterdir()} == GPT2_FOLDER_FILES | {"tokenizer.json"}
    assert isinstance(fastlm.load(folder), GPT)
    fastlm.save(a_model("Llama"), folder, shard_bytes=15_000)
    assert isinstance(fastlm.load(folder), Llama)
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_save_that_fails_leaves_what_was_there(fresh, tmp_path, monkeypatch):
    path = tmp_path / "model"
    if not fresh:
        fastlm.save(a_model("GPT"), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else None

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        fastlm.save(a_model("Llama"), path)
    after = {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else None
    assert after == before
    assert [file.name for file in tmp_path.iterdir()] == ([] if fresh else ["model"])


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_have_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        fastlm.save(a_model(), tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


# What is not what it should be


def edit_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, 'model_type is "t5", expected "gpt2" or "bert" or "roberta" or .*"llama" or "mistral"'),
        ({"model_type": ...}, "missing model_type, expected one of gpt2, bert"),
        ({"num_hidden_layers": 3}, "missing layers.2.input_layernorm.weight, .* and 3 more"),
        ({"num_hidden_layers": 1}, "unexpected layers.1.input_layernorm.weight"),
        ({"intermediate_size": 41}, r"layers.0.mlp.down_proj.weight has shape \(16, 40\) instead of \(16, 41\)"),
        ({"num_key_value_heads": 4}, r"self_attn.k_proj.weight has shape \(8, 16\) instead of \(16, 16\)"),
        ({"hidden_size": 18, "head_dim": None}, "n_embd is 18, expected a multiple of n_head 4"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is yarn, expected default or linear"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu", expected "silu"'),
        ({"vocab_size": ...}, "missing vocab_size"),
    ],
)
def test_says_how_config_and_weights_disagree(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        fastlm.load(folder)


def drop_from_shard(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    tensors.pop("model.norm.weight")
    save_file(tensors, shard)


def point_outside(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "expected config.json, best.safetensors, last.safetensors or one"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: sorted(f.glob("model-*"))[0].unlink(), "model-00001-of-00002.safetensors: no such file"),
        (lambda f: os.truncate(sorted(f.glob("model-*"))[0], 500), "cut short or not a safetensors file"),
        (drop_from_shard, "names tensors that its shards have not: model.norm.weight"),
        (point_outside, "names the shard '../model-00001-of-00002.safetensors', expected a file beside it"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json: has no weight_map"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        fastlm.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_one_file_of_a_folder_is_not_taken_for_a_checkpoint(folder, name):
    fastlm.load(folder)
    with pytest.raises(CheckpointError, match=rf"{name}: is one file of a Hugging Face folder; expected .*{folder}$"):
        fastlm.load(folder / name)


def test_a_checkpoint_that_lies_in_a_folder_is_one(folder):
    model = a_model()
    fastlm.save(model, folder / "model.safetensors", format="fastlm")
    assert_same(fastlm.load(folder / "model.safetensors"), model)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_that_holds_more_than_tensors_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fastlm.save(a_model(), tmp_path)
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(fastlm.load(tmp_path), a_model())
    torch.save(state | {"extra": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code and is not read"):
        fastlm.load(tmp_path)
    assert not Path("executed").exists()
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list, expected a dictionary of tensors"):
        fastlm.load(tmp_path)


ODD_TENSORS = {
    "sparse": (lambda t: t.to_sparse(), "wte.weight has the layout torch.sparse_coo, expected torch.strided"),
    "sparse rows": (lambda t: t.to_sparse_csr(), "wte.weight has the layout torch.sparse_csr"),
    "meta": (lambda t: t.to("meta"), "wte.weight is on meta, without values"),
    "complex": (lambda t: t.to(torch.complex64), "wte.weight has dtype torch.complex64, expected one that"),
    "packed": (
        lambda t: t.to(torch.uint8).view(torch.float4_e2m1fn_x2),
        "wte.weight has dtype torch.float4_e2m1fn_x2, expected one that",
    ),
    "expanded": (
        lambda t: torch.zeros(1, 1).expand(2**30, 2**30),
        r"wte.weight has shape \(1073741824, 1073741824\), more than the \d+ bytes of the file",
    ),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_pickle_whose_tensors_are_not_plain_values_of_the_file(tmp_path, kind):
    alter, message = ODD_TENSORS[kind]
    fastlm.save(a_model(), tmp_path)
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    name = next(name for name in state if name.endswith("wte.weight"))
    torch.save(state | {name: alter(state[name])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: (\w+\.)?{message}"):
        fastlm.load(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "header", "tensor"])
def test_a_damaged_best_checkpoint_names_the_last(tmp_path, damage):
    for name in ("best", "last"):
        fastlm.save(a_model(), tmp_path / f"{name}.safetensors", "fastlm")
    content = bytearray((tmp_path / "best.safetensors").read_bytes())
    content[{"header": 9, "tensor": -1}.get(damage, 0)] ^= 255
    (tmp_path / "best.safetensors").write_bytes(content if damage != "empty" else b"")
    with pytest.raises(CheckpointError, match=r"last\.safetensors can be given in its place$"):
        fastlm.load(tmp_path)


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="tensors alone do not say which model they are of"):
        fastlm.load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        fastlm.load(tmp_path / "nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not a fastlm checkpoint"):
        fastlm.load(tmp_path / "plain.safetensors")
    save_checkpoint(tmp_path / "odd.safetensors", a_model(), state={"model": "Mamba"})
    with pytest.raises(CheckpointError, match="holds a Mamba, expected one of GPT, BERT, Llama, Seq2Seq"):
        fastlm.load(tmp_path / "odd.safetensors")
    save_checkpoint(tmp_path / "mixed.safetensors", a_model(), state={"model": "BERT"})
    with pytest.raises(CheckpointError, match=r"its model configuration is not one of a BERT: .*unknown"):
        fastlm.load(tmp_path / "mixed.safetensors")


def test_formats_and_models_that_are_not_known(tmp_path):
    with pytest.raises(ConfigError, match="format is 'onnx', expected hf or fastlm"):
        fastlm.save(a_model(), tmp_path, format="onnx")
    with pytest.raises(CheckpointError, match="Linear has no Hugging Face layout here; those that have: BERT, GPT"):
        fastlm.save(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(CheckpointError, match="Linear is no model of fastlm"):
        fastlm.save(torch.nn.Linear(2, 2), tmp_path, format="fastlm")


# GGUF


def write_gguf(model, path, quantization="F32", kind="llama", extra=None, fields=None):
    """A file as llama.cpp's converter writes it, with the projections quantized; `fields` of the kind come on top."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    for name, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{kind}.{name}", value)
    if kind == "qwen3":
        writer.add_key_length(c.head_size)
    if kind == "phi3":
        writer.add_rope_dimension_count(c.rotary_size)
        writer.add_rope_scaling_orig_ctx_len(c.rope_original_context)
        if c.sliding_window:
            writer.add_sliding_window(c.sliding_window)
        if c.rope_attention_factor:
            writer.add_rope_scaling_attn_factors(c.rope_attention_factor)
        if c.rope_scaling:
            factors = {"long": c.rope_long_factors, "short": c.rope_short_factors}
            extra = {f"rope_factors_{name}.weight": torch.tensor(f) for name, f in factors.items()} | (extra or {})
    dtype = gguf.GGMLQuantizationType[quantization]
    for name, tensor in gguf_tensors(model, kind).items() | (extra or {}).items():
        values = tensor.detach().numpy().astype("float32")
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model, kind):
    names = {
        "attention_norm": "attn_norm",
        "mlp_norm": "ffn_norm",
        "attention.out": "attn_output",
        "mlp.down": "ffn_down",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            base = {"wte": "token_embd", "norm": "output_norm", "lm_head": "output"}[name.split(".")[0]]
            tensors[f"{base}.weight"] = tensor
            continue
        layer, module, leaf = match.groups()
        block = f"blk.{layer}."
        if kind == "phi3" and module in ("attention.qkv", "mlp.gate_up"):
            tensors[f"{block}{'attn_qkv' if module == 'attention.qkv' else 'ffn_up'}.{leaf}"] = tensor
        elif module == "attention.qkv":
            q, k, v = tensor.split(model.config.qkv_sizes)
            if kind == "llama":  # its rotary pairs are neighbours
                q, k = (side_by_side(x, n) for x, n in ((q, model.config.n_head), (k, model.config.n_kv_head)))
            tensors |= {f"{block}attn_{part}.{leaf}": x.contiguous() for part, x in zip("qkv", (q, k, v), strict=True)}
        elif module == "mlp.gate_up":
            gate, up = tensor.chunk(2)
            tensors |= {f"{block}ffn_gate.{leaf}": gate, f"{block}ffn_up.{leaf}": up}
        else:
            tensors[f"{block}{names[module]}.{leaf}"] = tensor
    return tensors


def side_by_side(x, heads):
    """Rows (0, 1, ..., D/2 | D/2 + 1, ...) of each head -> (0, D/2, 1, D/2 + 1, ...)."""
    D = x.shape[0] // heads
    order = [head * D + half * D // 2 + pair for head in range(heads) for pair in range(D // 2) for half in (0, 1)]
    return x[torch.tensor(order)]


def gguf_model(kind=Llama, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    sizes = {"n_kv_head": 2, "rope_theta": 500.0} | changes
    return perturbed(kind(config(61, 24, 2, 4, 32, 64, **sizes)))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_in_full_precision_is_exact(kind, tied, tmp_path):
    model = gguf_model(qkv_bias=kind == "qwen2", tie_embeddings=tied)
    write_gguf(model, tmp_path / "model.gguf", kind=kind)
    tokens = torch.arange(20)[None]
    again = fastlm.load(tmp_path)
    torch.testing.assert_close(again(tokens), model(tokens), rtol=1e-6, atol=1e-6)
    assert set(again.state_dict()) == set(model.state_dict())


LONGROPE = {"rope_scaling": "longrope", "rope_original_context": 10, "rope_attention_factor": 1.25,
            "rope_short_factors": (1.0, 1.5, 2.0), "rope_long_factors": (2.0, 2.5, 4.0)}  # fmt: skip
RELATIVES = {
    "qwen3": (Qwen3, Qwen3Config, {"head_size": 16}),
    "qwen3, tied": (Qwen3, Qwen3Config, {"head_size": 4, "tie_embeddings": True}),
    "qwen3, biases": (Qwen3, Qwen3Config, {"qkv_bias": True, "output_bias": True}),
    "phi3": (Phi3, Phi3Config, {}),
    "phi3, window": (Phi3, Phi3Config, {"rotary_share": 0.5, "sliding_window": 6, "tie_embeddings": True}),
    "phi3, longrope": (Phi3, Phi3Config, {"rotary_share": 0.75, **LONGROPE}),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_gguf_of_relatives_is_exact(name, tmp_path):
    model_kind, config, changes = RELATIVES[name]
    model = gguf_model(model_kind, config, **changes)
    write_gguf(model, tmp_path / "model.gguf", kind=name.split(",")[0])
    again = fastlm.load(tmp_path)
    assert type(again) is type(model)
    for length in (8, 20):
        tokens = torch.arange(length)[None]
        torch.testing.assert_close(again(tokens), model(tokens), rtol=1e-6, atol=1e-6)
    fastlm.save(again, tmp_path / "hf")
    assert fastlm.load(tmp_path / "hf").config == again.config


def test_gguf_of_a_phi3_that_is_not_whole(tmp_path):
    model = gguf_model(Phi3, Phi3Config, rotary_share=0.75, **LONGROPE)
    write_gguf(model, tmp_path / "model.gguf", kind="phi3", extra={"rope_factors_long.weight": torch.ones(5)})
    with pytest.raises(CheckpointError, match=r"rope_factors_long\.weight is not there with 3 factors"):
        fastlm.load(tmp_path)


@pytest.mark.parametrize(("quantization", "bits"), [("F16", 11), ("BF16", 8), ("Q8_0", 7)])
def test_gguf_quantized(quantization, bits, tmp_path):
    model = gguf_model()
    write_gguf(model, tmp_path / "model.gguf", quantization)
    again = fastlm.load(tmp_path / "model.gguf")
    for name, tensor in model.state_dict().items():
        # Half a step of the coarsest number in a row; Q8_0 steps by its block's largest over 127.
        bound = tensor.abs().max() * 2.0**-bits
        assert (again.state_dict()[name] - tensor).abs().max() <= bound, name


def test_gguf_llama3_wavelengths(tmp_path):
    model = gguf_model(rope_scaling="llama3", rope_factor=8.0)
    factors = rotary_frequencies(gguf_model().config) / rotary_frequencies(model.config)
    write_gguf(model, tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    again = fastlm.load(tmp_path / "model.gguf")
    assert again.config.rope_scaling == "llama3"
    torch.testing.assert_close(rotary_frequencies(again.config), rotary_frequencies(model.config))
    write_gguf(model, tmp_path / "odd.gguf", extra={"rope_freqs.weight": factors + 1})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not the scaling of Llama 3.1"):
        fastlm.load(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
        {"rope.scaling.type": "linear", "rope.scale_linear": 4.0},
    ],
)
def test_gguf_linear_scaling_under_any_of_its_names(tmp_path, fields):
    """llama.cpp's rules: without a type a factor is linear, and `rope.scale_linear` stands for it in older files."""
    model = gguf_model(rope_scaling="linear", rope_factor=4.0)
    write_gguf(model, tmp_path / "model.gguf", fields=fields)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(fastlm.load(tmp_path)(tokens), model(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 0.0}]
)
def test_gguf_without_scaling(tmp_path, fields):
    model = gguf_model()
    write_gguf(model, tmp_path / "model.gguf", fields=fields | {"rope.dimension_count": model.config.head_size})
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(fastlm.load(tmp_path)(tokens), model(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.dimension_count": 4}, r"rope\.dimension_count is 4, expected the heads' size, 8"),
        ({"attention.causal": False}, r"llama\.attention\.causal is not true"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"rope\.scaling\.type is 'yarn', expected none or"),
    ],
)
def test_gguf_settings_that_would_give_other_numbers(tmp_path, fields, message):
    write_gguf(gguf_model(), tmp_path / "model.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=message):
        fastlm.load(tmp_path)


def test_a_folder_of_two_ggufs_names_them(tmp_path):
    for name in ("one.gguf", "two.gguf"):
        write_gguf(gguf_model(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has one\.gguf, two\.gguf; expected the path of one of them"):
        fastlm.load(tmp_path)


def test_a_gguf_without_a_tokenizer(tmp_path):
    write_gguf(gguf_model(), tmp_path / "model.gguf")
    with pytest.raises(DataError, match=r"model\.gguf: holds no tokenizer; put the model's tokenizer\.json beside it"):
        fastlm.load_with_tokenizer(tmp_path)


def test_gguf_that_cannot_be_loaded(tmp_path, monkeypatch):
    model = gguf_model()
    path = tmp_path / "model.gguf"
    write_gguf(model, path, kind="falcon")
    with pytest.raises(
        CheckpointError, match=r"general\.architecture is 'falcon', expected llama or qwen2 or qwen3 or phi3"
    ):
        fastlm.load(path)
    write_gguf(model, path, extra={"blk.0.ffn_gate_inp.weight": torch.zeros(4, 32)})
    with pytest.raises(CheckpointError, match=r"unexpected blk\.0\.ffn_gate_inp\.weight"):
        fastlm.load(path)
    os.truncate(path, 300)
    with pytest.raises(CheckpointError, match="cut short or not a GGUF file"):
        fastlm.load(path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match="need the gguf package: pip install gguf"):
        fastlm.load(path)


# What load could not read is not saved


def first_linear(model):
    return next(layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))


def replaced(model, name, parameter):
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


class Labelled(torch.Tensor):
    pass


class Adapter(torch.nn.Module):
    """A layer with a low-rank addition, as adapters wrap it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def wrap(model):
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    replaced(model, name, Adapter(layer))


def drop_last_layer(model):
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    del layers[-1]


ALTERED = {
    "pruned": (lambda m: prune.l1_unstructured(first_linear(m), "weight", 0.3), "weight_orig"),
    "weight_norm": (lambda m: parametrizations.weight_norm(first_linear(m)), "parametrizations.weight.original0"),
    "spectral_norm": (lambda m: torch.nn.utils.spectral_norm(first_linear(m)), "weight_u"),
    "adapter": (wrap, "base_layer.weight"),
    "meta": (lambda m: m.wte.to("meta"), "wte.weight is on meta"),
    "subclass": (
        lambda m: replaced(m, "wte.weight", torch.nn.Parameter(m.wte.weight.detach().as_subclass(Labelled))),
        "wte.weight is a Labelled",
    ),
    "resized": (
        lambda m: replaced(m, "wte.weight", torch.nn.Parameter(torch.zeros(70, 16))),
        r"wte.weight has shape \(70, 16\) instead of \(61, 16\)",
    ),
    "integers": (
        lambda m: replaced(m, "wte.weight", torch.nn.Parameter(torch.zeros(61, 16).char(), requires_grad=False)),
        "wte.weight is torch.int8, expected a floating-point dtype",
    ),
    "fewer layers": (drop_last_layer, "missing"),
    "another buffer": (lambda m: m.register_buffer("seen", torch.zeros(1)), "unexpected seen"),
    "configuration": (lambda m: object.__setattr__(m.config, "vocab_size", "many"), "vocab_size is 'many'"),
}


@pytest.mark.parametrize("format", ["hf", "fastlm"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("altered", ALTERED)
def test_what_load_could_not_read_is_refused_before_a_byte_is_written(altered, name, format, tmp_path):
    alter, message = ALTERED[altered]
    model = a_model(name)
    alter(model)
    with pytest.raises(CheckpointError, match=message):
        fastlm.save(model, tmp_path / "new" / "folder", format=format)
    assert not list(tmp_path.iterdir())


def share_two(model):
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    one, other = next((a, b) for a, b in combinations(layers, 2) if a.weight.shape == b.weight.shape)
    other.weight = one.weight


KEPT = {  # what may be done to a model that is saved
    "bfloat16": lambda m: m.bfloat16(),
    "float64": lambda m: m.double(),
    "mixed": lambda m: first_linear(m).bfloat16(),
    "strided": lambda m: replaced(m, "wte.weight", torch.nn.Parameter(m.wte.weight.detach().t().contiguous().t())),
    "expanded": lambda m: replaced(m, "wte.weight", torch.nn.Parameter(torch.randn(1, 16).expand(61, 16))),
    "one memory": lambda m: replaced(m, "wte.weight", torch.nn.Parameter(torch.randn(99, 16)[20:81])),
    "shared": share_two,
    "not finite": lambda m: m.wte.weight.data[3].fill_(torch.nan),
    "frozen": lambda m: m.requires_grad_(False),
    "accelerated": fastlm.accelerate,
}


@pytest.mark.parametrize("format", ["hf", "fastlm"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("altered", KEPT)
def test_what_load_can_read_is_saved_as_it_is(altered, name, format, tmp_path):
    model = a_model(name)
    KEPT[altered](model)
    fastlm.save(model, tmp_path, format=format)
    again = fastlm.load(tmp_path, dtype=torch.float64)
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(state[key], tensor.double(), rtol=0, atol=0, equal_nan=True, msg=key)
    if (altered, format) == ("shared", "fastlm"):  # in which others' folders have no say
        assert len(list(again.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("untied", [False, True])
def test_an_encoder_decoder_of_the_default_configuration(untied, tmp_path):
    changes = {"tie_embeddings": False, "source_vocab_size": 50} if untied else {}
    torch.manual_seed(0)
    model = perturbed(Seq2Seq(Seq2SeqConfig(61, 24, n_encoder_layer=2, n_decoder_layer=1, **changes)))
    fastlm.save(model, tmp_path)
    source, target = torch.arange(3, 40).view(1, -1)[:, :20], torch.arange(30, 50)[None]
    again = fastlm.load(tmp_path)
    expected = model(source, target)
    torch.testing.assert_close(again(source, target), expected, rtol=0, atol=0)
    assert again.config.source_vocab_size == model.config.source_vocab_size
    # In fp64: with 512 elements and these weights the logits are of order 100.
    theirs = reload_as_theirs(transformers.MarianMTModel, tmp_path).double()
    torch.testing.assert_close(theirs(source, decoder_input_ids=target).logits, model.double()(source, target), **CLOSE)


# Damage that only the numbers show


@pytest.mark.parametrize("name", ["GPT", "Llama"])
@pytest.mark.parametrize("format", ["hf", "fastlm", "gguf", "pickle", "quantized"])
def test_tensors_that_are_not_finite(name, format, tmp_path, capsys):
    model = gguf_model() if name == "Llama" else a_model("GPT")
    model.wte.weight.data[1, :3] = torch.nan
    model.wte.weight.data[2, 5] = -torch.inf
    path = tmp_path / "model"
    names = {"gguf": "token_embd.weight", "fastlm": "wte.weight", "quantized": "wte.weight"}
    their = names.get(format, "transformer.wte.weight" if name == "GPT" else "model.embed_tokens.weight")
    if format == "gguf":
        if name == "GPT":
            pytest.skip("GGUF is read of Llama types")
        path = tmp_path / "model.gguf"
        write_gguf(model, path)
    elif format == "quantized":
        finite = model.wte.weight.data.clone()
        model.wte.weight.data = finite.nan_to_num(posinf=0, neginf=0)
        fastlm.quantize(model)
        model.wte.weight.data = finite
        fastlm.save(model, path, "fastlm")
    else:
        fastlm.save(model, path, "hf" if format == "pickle" else format)
    if format == "pickle":
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    assert fastlm.load(path).wte.weight.isnan().sum() == 3
    with pytest.raises(CheckpointError, match=f"{path}.*: {their} holds 3 NaN and 1 infinities"):
        fastlm.load(path, check_tensors=True)
    fastlm.data.Tokenizer.characters(["abc"]).save((path if path.is_dir() else tmp_path) / "tokenizer.json")
    assert cli(["generate", str(path), "--prompt", "abc", "--check-tensors"]) == 1
    assert f"{their} holds 3 NaN and 1 infinities" in capsys.readouterr().err


def test_finite_tensors_are_found_to_be_so(tmp_path):
    fastlm.save(a_model(), tmp_path)
    assert_same(fastlm.load(tmp_path, check_tensors=True), a_model())
    model = a_model()
    model.wte.weight.data[0, 0] = 1e6  # which half precision does not hold
    fastlm.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"wte\.weight holds 1 infinities"):
        fastlm.load(tmp_path, dtype=torch.float16, check_tensors=True)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    model = GPT(GPTConfig(23, 8, 1, 2, 16))
    for format in ("hf", "fastlm"):
        fastlm.save(model, tmp_path / format, format=format)
        with pytest.raises(DataError, match=r"no such tokenizer.*copy it there, since `fastlm.save` writes a model"):
            fastlm.load_with_tokenizer(tmp_path / format)
