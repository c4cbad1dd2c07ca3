"""One of two processes of test_fsdp.py: models sharded block by block against the same models whole.

python fsdp_worker.py RANK STORE OUT writes {case: message or ""} to OUT.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastlm.nn
from fastlm.models import BERT, GPT, BERTConfig, GPTConfig, Llama, LlamaConfig, Seq2Seq, Seq2SeqConfig
from fastlm.training import AdamW

V, C, T = 23, 16, 6
SIZES = {"vocab_size": V, "context_length": 8, "n_head": 2, "n_embd": C}
IDS = torch.arange(4 * T).view(4, T) * 7 % (V - 3) + 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def gpt(**options):
    return GPT(GPTConfig(**SIZES, n_layer=3, **options))


def llama(**options):
    return Llama(LlamaConfig(**SIZES, n_layer=3, n_kv_head=1, n_inner=20, **options))


def bert():
    return BERT(BERTConfig(**SIZES, n_layer=2, dropout=0.0, attention_dropout=0.0))


def seq2seq(**options):
    return Seq2Seq(Seq2SeqConfig(**SIZES, n_encoder_layer=2, n_decoder_layer=2, dropout=0.0, **options))


def encoder(package):
    layer = package.TransformerEncoderLayer(C, 2, 20, 0.0, "gelu", batch_first=True, norm_first=True)
    return package.TransformerEncoder(layer, 2, package.LayerNorm(C), enable_nested_tensor=False)


def transformer():
    return fastlm.nn.Transformer(C, 2, 2, 2, 20, 0.0, batch_first=True)


def accelerated():
    model = encoder(nn)
    fastlm.accelerate(model)
    return model


def tokens_loss(model, ids):
    return model(ids[:, :-1], ids[:, 1:].contiguous())


def bert_loss(model, ids):
    return model.loss(ids, ids.masked_fill(ids % 3 != 0, -100), ids != 5)


def seq2seq_loss(model, ids):
    return model.loss(ids, ids.flip(1))


def numbers(ids):
    return torch.sin(ids[..., None] * torch.arange(1, C + 1))


# name: (build, its blocks, loss)
CASES = {
    "gpt": (gpt, lambda m: m.h, tokens_loss),
    "gpt, head apart": (
        lambda: gpt(tie_embeddings=False),
        lambda m: [*m.h, m.wpe, m.wte, m.ln_f, m.lm_head],
        tokens_loss,
    ),
    "gpt, first block whole": (gpt, lambda m: m.h[1:], tokens_loss),
    "gpt, norms and layers": (gpt, lambda m: [part for b in m.h for part in (b.ln_1, b.mlp.c_fc, b.mlp)], tokens_loss),
    "llama": (llama, lambda m: m.layers, tokens_loss),
    "llama, head apart": (
        lambda: llama(tie_embeddings=False),
        lambda m: [*m.layers, m.wte, [m.norm, m.lm_head]],
        tokens_loss,
    ),
    "bert": (bert, lambda m: [*m.layers, m.masked_lm, m.wpe, m.wse], bert_loss),
    "seq2seq": (seq2seq, lambda m: [*m.encoder, *m.decoder], seq2seq_loss),
    "seq2seq, pre-norm": (
        lambda: seq2seq(norm_first=True, activation="gelu", positions="learned"),
        lambda m: [*m.encoder, *m.decoder, m.source_wpe],
        seq2seq_loss,
    ),
    "encoder": (lambda: encoder(fastlm.nn), lambda m: m.layers, lambda m, ids: m(numbers(ids)).square().mean()),
    "accelerated": (accelerated, lambda m: m.layers, lambda m, ids: m(numbers(ids)).square().mean()),
    "transformer": (
        transformer,
        lambda m: [*m.encoder.layers, *m.decoder.layers],
        lambda m, ids: m(numbers(ids), numbers(ids.flip(1))).square().mean(),
    ),
}


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compare(build, blocks, loss, mesh) -> None:
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    truth = copy.deepcopy(model)
    for part in blocks(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
    mine = IDS.chunk(dist.get_world_size())[dist.get_rank()]
    # A mean of means; every process counts as many targets, but BERT's.
    parts = [loss(truth, part) for part in IDS.chunk(dist.get_world_size())]
    expected = sum(parts) / len(parts)
    expected.backward()
    actual = loss(model, mine)
    torch.testing.assert_close(actual, parts[dist.get_rank()], **CLOSE)
    actual.backward()
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    ours, theirs = AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(truth.parameters(), lr=0.01)
    norm = nn.utils.clip_grad_norm_(truth.parameters(), 0.1)
    torch.testing.assert_close(ours.gradient_norm(), norm.item(), **CLOSE)
    ours.step(max_norm=0.1)
    theirs.step()
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        # An update divides by the gradient's size: where that is rounding, both are of any sign.
        sure = q.grad.abs() > 1e-6
        torch.testing.assert_close(whole(p)[sure], q[sure], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def compare_mixed_lists(mesh) -> None:
    """AdamW over shards and ordinary tensors in one group, with options of torch's step too."""
    for options in ({}, {"amsgrad": True}, {"fused": True}, {"foreach": True}):
        values = [torch.linspace(-1, 1, n).view(-1, 3) for n in (9, 12, 3)]
        placed = [distribute_tensor(values[0], mesh, [Shard(0)]), values[1].clone()]
        placed.append(distribute_tensor(values[2], mesh, [Replicate()]))
        ours, theirs = ([nn.Parameter(x) for x in xs] for xs in (placed, [x.clone() for x in values]))
        optimizer, truth = AdamW(ours, lr=0.1, **options), torch.optim.AdamW(theirs, lr=0.1)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *args, calls=calls: calls.append(1))
        for step in range(3):
            for p, q in zip(ours, theirs, strict=True):
                q.grad = torch.cos(q.detach() * (step + 2))
                grad = q.grad.clone()
                p.grad = distribute_tensor(grad, mesh, p.placements) if isinstance(p, DTensor) else grad
            norm = nn.utils.clip_grad_norm_(theirs, 0.5)
            torch.testing.assert_close(optimizer.gradient_norm(), norm.item(), **CLOSE)
            optimizer.step(max_norm=0.5)
            truth.step()
        assert len(calls) == 3
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(whole(p), q, **CLOSE)


def main(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    results = {}
    cases = {name: partial(compare, *case) for name, case in CASES.items()}
    for name, check in (cases | {"mixed lists": compare_mixed_lists}).items():
        try:
            check(mesh)
            results[name] = ""
        except Exception:  # the other process fails likewise, so that the next case starts together
            results[name] = traceback.format_exc()
    Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
