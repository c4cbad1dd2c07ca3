"""Llama-type models in GGUF files: llama.cpp's names and settings in Hugging Face's terms, weights dequantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._core.tensor_file import Stored
from ...errors import CheckpointError, ConfigError
from ...models.common.config import shown
from ...models.common.generation import Generation, carry
from ...models.llama import rotary_frequencies
from ..hf.layout import Architecture, Settings, assemble
from ..hf.llama import LLAMA_FOLDER, QWEN2_FOLDER
from ..hf.phi3 import PHI3_FOLDER
from ..hf.qwen3 import QWEN3_FOLDER
from .file import open_gguf


class Kind(NamedTuple):
    """What a kind of Llama has of its own in these files.

    Attributes:
        folder: of the same family.
        names: of modules of a block that others have not, in Hugging Face's terms.
        permuted: whether rows of queries and keys lie in rotary pairs.
    """

    folder: Architecture
    names: Mapping[str, str] = MappingProxyType({})
    permuted: bool = False


KINDS = {
    "llama": Kind(LLAMA_FOLDER, permuted=True),
    "qwen2": Kind(QWEN2_FOLDER),
    "qwen3": Kind(QWEN3_FOLDER, {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}),
    "phi3": Kind(PHI3_FOLDER, {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
}
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
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}

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


def load_gguf(
    path: Path, dropout: float | None = None, dtype: torch.dtype | None = None, check_tensors: bool = False
) -> nn.Module:
    """Load a Llama, Mistral, Qwen 2, Qwen 3 or Phi-3 from a GGUF file, its weights dequantized; see `fastlm.load`.

    Raises:
        CheckpointError: if the `gguf` package is missing, the file is damaged or of another architecture, or its
            tensors do not fit its settings.
    """
    fields, tensors = open_gguf(path, _package())
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{path}: general.architecture is {shown(kind)}, expected {' or '.join(KINDS)}")
    settings = Settings(_settings(path, fields, kind, tensors), path)

    def read() -> dict[str, Stored]:
        return _named(tensors, settings, KINDS[kind])

    model = assemble(KINDS[kind].folder, settings, read, path, dropout, dtype, check_tensors)
    carry(model, _generation(fields, path))
    return model


def read_fields(path: Path) -> dict[str, Any]:
    """All settings of a GGUF file.

    Raises:
        CheckpointError: if the file is damaged.
    """
    return open_gguf(path).fields


def _generation(fields: dict[str, Any], path: Path) -> Generation:
    """What llama.cpp makes of a file: where texts end, and how it would be sampled."""
    tokens = fields.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is {shown(tokens)}, expected a list")
    named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in (*END_IDS, "bos", "padding")}
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
    sampling = {theirs: fields.get(f"general.sampling.{name}") for name, theirs in SAMPLING.items()}
    said |= {name: value for name, value in sampling.items() if value is not None}
    if any(value is not None for value in sampling.values()):
        said["do_sample"] = said.get("temperature", 1.0) != 0
    if forbidden := fields.get("tokenizer.ggml.suppress_tokens"):
        said["suppress_tokens"] = forbidden
    return Generation(said, ids, str(path))


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF files need the gguf package: pip install gguf ({error})") from error
    return gguf


def _settings(path: Path, fields: dict[str, Any], kind: str, tensors: dict[str, Stored]) -> dict[str, Any]:
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
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": field("context_length"),
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", None),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "attention_bias": kind != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    # llama.cpp takes a factor without a type for a linear one; older files have it under another name.
    scaling, factor = field("rope.scaling.type", None), field("rope.scaling.factor", field("rope.scale_linear", 0))
    known = "longrope" if kind == "phi3" else "linear"
    if scaling not in (None, "none", known):
        raise CheckpointError(f"{path}: rope.scaling.type is {shown(scaling)}, expected none or {known}")
    if field("attention.causal", True) is not True:
        raise CheckpointError(f"{path}: {kind}.attention.causal is not true: every token would look at all others")
    if kind == "phi3":
        if factor not in (0, 1):
            raise CheckpointError(f"{path}: rope.scaling.factor is {shown(factor)}, expected none for a phi3")
        return settings | _phi3_settings(path, field, settings, tensors)
    if scaling == "linear" or (scaling is None and factor):
        settings["rope_scaling"] = {"rope_type": "linear", "factor": factor or field("rope.scaling.factor")}
    _check_whole_heads(path, field("rope.dimension_count", None), settings)
    if FACTORS in tensors:
        settings["rope_scaling"] = _llama3_scaling(path, tensors[FACTORS], settings)
    return settings


def _check_whole_heads(path: Path, rotated: Any, settings: dict[str, Any]) -> None:
    """Raise CheckpointError where fewer dimensions of a head rotate than it has."""
    if rotated is None:
        return
    try:
        size = LLAMA_FOLDER.read(Settings(settings, path), None).head_size
    except ConfigError:  # `assemble` names what is wrong with the sizes
        return
    if rotated != size:
        raise CheckpointError(f"{path}: rope.dimension_count is {shown(rotated)}, expected the heads' size, {size}")


def _phi3_settings(
    path: Path, field: Callable[..., Any], settings: dict[str, Any], tensors: dict[str, Stored]
) -> dict[str, Any]:
    """Phi-3's own: its heads' turning part, its window, and the factors of LongRoPE, which are tensors here."""
    width, heads, head_size = settings["hidden_size"], settings["num_attention_heads"], settings["head_dim"]
    turning = field("rope.dimension_count", None)
    if not all(size is None or (type(size) is int and size > 0) for size in (width, heads, head_size, turning)):
        raise CheckpointError(f"{path}: its sizes of heads are {shown([width, heads, head_size, turning])}")
    head_size = head_size or max(width // heads, 1)
    turning = turning or head_size
    original = field("rope.scaling.original_context_length", settings["max_position_embeddings"])
    own = {
        "sliding_window": field("attention.sliding_window", None) or None,
        "original_max_position_embeddings": original,
        # Rounded up, since theirs is cut off to whole elements.
        "partial_rotary_factor": 1.0 if turning == head_size else math.nextafter(turning / head_size, math.inf),
    }
    if not any(name in tensors for name in LONGROPE.values()):
        return own
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for theirs, name in LONGROPE.items():
        if name not in tensors or tensors[name].shape != (turning // 2,):
            raise CheckpointError(f"{path}: {name} is not there with {turning // 2} factors")
        scaling[theirs] = [float(factor) for factor in tensors[name].read(None).float()]
    if (attention_factor := field("rope.scaling.attn_factor", None)) is not None:
        scaling["attention_factor"] = attention_factor
    return own | {"rope_scaling": scaling}


def _llama3_scaling(path: Path, stored: Stored, settings: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, of which GGUF keeps only what each wavelength was stretched by."""
    try:
        plain = LLAMA_FOLDER.read(Settings(settings, path), None)
        if stored.shape != (plain.head_size // 2,):
            raise ConfigError(f"{FACTORS} has shape {stored.shape}, expected ({plain.head_size // 2},)")
        factors = stored.read(None)
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        scaled = LLAMA_FOLDER.read(Settings(settings | {"rope_scaling": scaling}, path), None)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not torch.allclose(factors, rotary_frequencies(plain) / rotary_frequencies(scaled), rtol=1e-3):
        raise CheckpointError(f"{path}: {FACTORS} is not the scaling of Llama 3.1")
    return scaling


def _named(tensors: dict[str, Stored], settings: Settings, kind: Kind) -> dict[str, Stored]:
    """Tensors under Hugging Face's names; unknown ones keep theirs and are reported as such."""
    heads = {"attn_q": settings.get("num_attention_heads"), "attn_k": settings.get("num_key_value_heads")}
    names = {**BLOCK_NAMES, **kind.names}
    named = {}
    for name, stored in tensors.items():
        if name == FACTORS or name in LONGROPE.values():
            continue
        block = name.split(".")
        if block[0] == "blk" and len(block) == 4 and block[2] in names:
            if kind.permuted and block[2] in heads:
                stored = _halves(stored, heads[block[2]])
            named[f"layers.{block[1]}.{names[block[2]]}.{block[3]}"] = stored
        else:
            module, _, leaf = name.rpartition(".")
            named[f"{NAMES.get(module, module)}.{leaf}"] = stored
    return named


def _halves(stored: Stored, heads: int) -> Stored:
    """Rows of a head's rotary pairs side by side, as llama.cpp has them -> all first elements, then all second."""

    def read(into: Tensor | None = None) -> Tensor:
        rows = stored.read(into)  # of a size that was found to be that of `heads` heads
        halves = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return halves if into is None else into.copy_(halves)

    return stored._replace(read=read)
