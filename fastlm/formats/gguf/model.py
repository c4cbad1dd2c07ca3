"""Llama-type models in GGUF files: llama.cpp's names and settings in Hugging Face's terms, weights dequantized."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...models.common.generation import Generation, carry
from ...models.llama import rotary_frequencies
from ..hf.files import listed
from ..hf.layout import Settings, assemble
from ..hf.llama import LLAMA_FOLDER

KINDS = ("llama", "qwen2")
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
FACTORS = "rope_freqs.weight"

CONTROL, USER_DEFINED = 3, 4  # types of tokens
# Names of tokens that end a text in llama.cpp, whatever else the file says: llama-vocab.cpp, `special_eog_ids`.
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
END_IDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # fmt: skip


def load_gguf(path: Path, dropout: float | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a Llama, Mistral or Qwen2 from a GGUF file, its weights dequantized.

    Raises:
        CheckpointError: if the `gguf` package is missing, the file is damaged or of another architecture, or its
            tensors do not fit its settings.
    """
    gguf = _package()
    reader = _open(path)
    fields = _fields(reader, "tokenizer.")
    kind = fields.get("general.architecture")
    if kind not in KINDS:
        raise CheckpointError(f"{path}: general.architecture is {kind!r}, expected {' or '.join(KINDS)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    settings = Settings(_settings(path, fields, kind, tensors), path)

    def read() -> dict[str, Tensor]:
        return _named(path, gguf, tensors, settings, permuted=kind == "llama")

    model = assemble(LLAMA_FOLDER, settings, read, path, dropout, dtype)
    carry(model, _generation(reader, path))
    return model


def read_fields(path: Path) -> dict[str, Any]:
    """All settings of a GGUF file.

    Raises:
        CheckpointError: if the `gguf` package is missing or the file is damaged.
    """
    return _fields(_open(path))


def _generation(reader: Any, path: Path) -> Generation:
    """What llama.cpp makes of a file: where texts end, and how it would be sampled."""

    def field(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    tokens = field("tokenizer.ggml.tokens") or []
    named = {name: field(f"tokenizer.ggml.{name}_token_id") for name in (*END_IDS, "bos", "padding")}
    known = {name: token for name, token in named.items() if isinstance(token, int) and 0 <= token < len(tokens)}
    ends = {known[name] for name in END_IDS if name in known}
    ends |= {index for index, token in enumerate(tokens) if token in END_NAMES}
    said: dict[str, Any] = {name: known[short] for name, short in (("bos_token_id", "bos"), ("pad_token_id", "padding"))
                            if short in known}  # fmt: skip
    texts = {tokens[token]: token for token in ends}
    if {"<|call|>", "<|calls|>"} & texts.keys() and {"<|return|>", "<|flush|>"} & texts.keys():
        ends.discard(texts.get("<|end|>", -1))  # there it ends one message of several
    if "<|tool_response>" in texts:
        ends.discard(texts.get("</s>", -1))
    if ends:
        first = known.get("eos", min(ends))
        said["eos_token_id"] = [first, *sorted(ends - {first})] if len(ends) > 1 else first
    ids = dict(said)
    sampling = {theirs: field(f"general.sampling.{name}") for name, theirs in SAMPLING.items()}
    said |= {name: value for name, value in sampling.items() if value is not None}
    if any(value is not None for value in sampling.values()):
        said["do_sample"] = said.get("temperature", 1.0) > 0
    if forbidden := field("tokenizer.ggml.suppress_tokens"):
        said["suppress_tokens"] = list(forbidden)
    return Generation(said, ids, str(path))


def _open(path: Path) -> Any:
    try:
        return _package().GGUFReader(path)
    except CheckpointError:
        raise
    except Exception as error:  # a cut file fails in numpy, in any way
        raise CheckpointError(f"{path}: cut short or not a GGUF file: {error}") from error


def _fields(reader: Any, but: str = "\0") -> dict[str, Any]:
    """Without those that begin with `but`, which for a vocabulary would be long."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith(but)}


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF files need the gguf package: pip install gguf ({error})") from error
    return gguf


def _settings(path: Path, fields: dict[str, Any], kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    def field(name: str, *default: Any) -> Any:
        if f"{kind}.{name}" not in fields and not default:
            raise CheckpointError(f"{path}: missing {kind}.{name}")
        return fields.get(f"{kind}.{name}", *default)

    heads = field("attention.head_count")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path}: missing token_embd.weight")
    settings = {
        "model_type": kind,
        "vocab_size": int(embedding.shape[1]),  # GGUF lists extents from the innermost on
        "max_position_embeddings": field("context_length"),
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", None),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    scaling = field("rope.scaling.type", "none")
    if scaling == "linear":
        settings["rope_scaling"] = {"rope_type": "linear", "factor": field("rope.scaling.factor")}
    elif scaling != "none":
        raise CheckpointError(f"{path}: rope.scaling.type is {scaling!r}, expected none or linear")
    if FACTORS in tensors:
        settings["rope_scaling"] = _llama3_scaling(path, tensors[FACTORS].data, settings)
    return settings


def _llama3_scaling(path: Path, factors: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, of which GGUF keeps only what each wavelength was stretched by."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, plain = (
        LLAMA_FOLDER.read(Settings(settings | {"rope_scaling": rope}, path), None) for rope in (scaling, None)
    )
    expected = rotary_frequencies(plain) / rotary_frequencies(scaled)
    if not torch.allclose(torch.from_numpy(factors.astype(np.float32)), expected, rtol=1e-3):
        raise CheckpointError(f"{path}: {FACTORS} is not the scaling of Llama 3.1")
    return scaling


def _named(
    path: Path, gguf: ModuleType, tensors: dict[str, Any], settings: Settings, permuted: bool
) -> dict[str, Tensor]:
    """Dequantized tensors under Hugging Face's names; unknown ones keep theirs and are reported as such."""
    heads = {"attn_q": settings.get("num_attention_heads"), "attn_k": settings.get("num_key_value_heads")}
    named = {}
    for name, tensor in tensors.items():
        if name == FACTORS:
            continue
        block = name.split(".")
        try:
            values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: {listed([name])} is {tensor.tensor_type.name}: {error}") from error
        if block[0] == "blk" and len(block) == 4 and block[2] in BLOCK_NAMES:
            if permuted and block[2] in heads:
                values = _halves(values, heads[block[2]])
            named[f"layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{block[3]}"] = values
        else:
            module, _, leaf = name.rpartition(".")
            named[f"{NAMES.get(module, module)}.{leaf}"] = values
    return named


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of a head's rotary pairs side by side, as llama.cpp has them -> all first elements, then all second."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
