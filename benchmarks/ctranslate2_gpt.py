"""GPT-2 in CTranslate2, from the same weights as everyone's."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import torch
from torch import Tensor

from fastlm.models.gpt import GPTConfig

from .case import Built, Case, Unavailable
from .peers import attribute


def build_ctranslate2(config: GPTConfig, state: dict[str, Tensor], tokens: Tensor, case: Case) -> Built:
    """Generation of `case` by CTranslate2, in the case's dtype if its CPU code has that."""
    library: Any = importlib.import_module("ctranslate2")
    if tokens.device.type != "cpu" or case.dtype not in library.get_supported_compute_types("cpu"):
        raise Unavailable(f"CTranslate2 has no {case.dtype} on this {tokens.device.type}")
    with tempfile.TemporaryDirectory() as folder:
        _spec(config, state, case.dtype).save(folder)
        generator = library.Generator(
            folder, device="cpu", compute_type=case.dtype, intra_threads=torch.get_num_threads(), inter_threads=1
        )
    N = case.shape[2]
    prompts = [[str(token) for token in row] for row in tokens.tolist()]

    def run() -> object:
        return generator.generate_batch(
            prompts, max_length=N, min_length=N, sampling_topk=1, include_prompt_in_result=False
        )

    storage = generator.forward_batch(prompts).to(library.DataType.float32)
    logits = torch.from_numpy(importlib.import_module("numpy").array(storage))
    return Built({"fwd": run}, {"output 0": logits[:, -1, : config.vocab_size]}, "ctranslate2")


def _spec(config: GPTConfig, state: dict[str, Tensor], dtype: str) -> Any:
    activation = attribute("ctranslate2.specs", "Activation").GELUTanh
    kind = attribute("ctranslate2.specs", "TransformerDecoderModelSpec")
    spec = kind.from_config(config.n_layer, config.n_head, pre_norm=True, activation=activation)
    values = {name: t.float().numpy() for name, t in state.items()}

    def fill(target: Any, name: str, weight: str = "weight", bias: str = "bias") -> None:
        setattr(target, weight, values[f"{name}.weight"])
        if f"{name}.bias" in values:
            setattr(target, bias, values[f"{name}.bias"])

    decoder = spec.decoder
    decoder.scale_embeddings = False
    fill(decoder.embeddings, "wte")
    fill(decoder.position_encodings, "wpe", weight="encodings")
    fill(decoder.layer_norm, "ln_f", "gamma", "beta")
    fill(decoder.projection, "wte")
    for i, layer in enumerate(decoder.layer):
        fill(layer.self_attention.layer_norm, f"h.{i}.ln_1", "gamma", "beta")
        fill(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        fill(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        fill(layer.ffn.layer_norm, f"h.{i}.ln_2", "gamma", "beta")
        fill(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        fill(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization=None if dtype == "float32" else dtype)
    return spec
