"""scaled_dot_product_attention over B sequences of T tokens with H heads of size D; "decode" has one query.

With "+dropout" weights are dropped as well, which "dropout" does under a causal mask.
"varlen" is attention_varlen over B packed sequences of T / B, 2 T / B, ... T tokens; PyTorch takes one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .case import Case, Counts, Unavailable
from .kernel import Function, Inputs, KernelBenchmark, each_dtype
from .peers import attribute
from .providers import need_cuda

MASKED_DROPOUT = ("padding+dropout", "bias+dropout")  # what PyTorch has no fused kernel for
VARIANTS = (
    "causal", "full", "padding", "bias", "dropout", *MASKED_DROPOUT, "gqa", "window", "softcap", "varlen", "decode",
)  # fmt: skip
CAUSAL = ("causal", "dropout", "gqa", "window", "softcap", "varlen")
WINDOW = 128  # keys before each query
SOFTCAP = 30.0
GQA_GROUP = 3  # query heads that share a key
DROPOUT = 0.1
PADDED = 0.75  # of the keys are real


def _table(quick: bool, device: str) -> list[Case]:
    def case(B: int, H: int, T: int, D: int, variant: str = "causal", passes=("fwd", "bwd"), headline=False) -> Case:
        return Case("attention", (B, H, T, D), "", variant, passes, headline)

    if quick:
        cases = [case(2, 12, 256, 64, headline=True), case(1, 12, 1024, 64, "decode", ("fwd",))]
        return each_dtype([*cases, *(case(1, 12, 128, 64, variant, ("full",)) for variant in MASKED_DROPOUT)])
    if device != "cpu":
        # the longest with fewer heads: their truth takes the square of the length in fp64 several times
        lengths = [(32, 16, 512), (16, 16, 1024), (8, 16, 2048), (4, 16, 4096), (2, 8, 8192), (1, 4, 16384)]
        cases = [case(*length, D) for D in (64, 128) for length in lengths]
        others = ("padding", "bias", "dropout", "gqa", "window", "softcap", "varlen")
        cases += [case(8, 12, 1024, 64, variant) for variant in others]
        cases += [
            case(8, 12, 1024, D, variant, ("fwd", "bwd", "full")) for D in (64, 128) for variant in MASKED_DROPOUT
        ]
        cases += [case(B, 12, 16384, 64, "decode", ("fwd",)) for B in (1, 16)]
        return each_dtype(cases, ("bfloat16", "float16"))
    cases = [case(max(1, 1024 // T), 12, T, 64, headline=T == 1024) for T in (256, 512, 1024, 2048)]
    cases += [case(max(1, 1024 // T), 6, T, 128) for T in (256, 2048)]
    cases += [case(1, 12, 1024, 64, "full")]
    masked = ("padding", "bias", "dropout", "gqa", "window", "softcap")
    cases += [case(2, 12, 512, 64, variant, ("fwd",)) for variant in masked]
    cases += [case(1, 12, 512, 64, variant, ("full",)) for variant in MASKED_DROPOUT]
    cases += [case(8, 12, 512, 64, "varlen")]
    return each_dtype([*cases, case(1, 12, 1024, 64, "decode", ("fwd",)), case(1, 12, 1, 64, "full", ("fwd",))])


def _mask(case: Case) -> str:
    """What kind of mask a variant has, or the variant."""
    return case.variant.removesuffix("+dropout")


def _lengths(case: Case) -> list[int]:
    B, _, T, _ = case.shape
    return [T * (b + 1) // B for b in range(B)]


def _packed_inputs(case: Case, device: str) -> Inputs:
    _, H, _, D = case.shape
    lengths = _lengths(case)
    drawn = [torch.randn(sum(lengths), H, D, device=device).to(case.torch_dtype) for _ in range(3)]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return Inputs((*drawn, offsets), (0, 1, 2))


def _inputs(case: Case, device: str) -> Inputs:
    if case.variant == "varlen":
        return _packed_inputs(case, device)
    B, H, T, D = case.shape
    queries = 1 if case.variant == "decode" else T
    kv_heads = H // GQA_GROUP if case.variant == "gqa" else H
    shapes = [(B, H, queries, D), (B, kv_heads, T, D), (B, kv_heads, T, D)]
    drawn = [torch.randn(*shape, device=device).to(case.torch_dtype) for shape in shapes]
    if _mask(case) == "padding":
        mask = (torch.arange(T, device=device) < int(T * PADDED)).expand(B, 1, 1, T)
    elif _mask(case) == "bias":
        mask = torch.randn(H, T, T, device=device).to(case.torch_dtype)
    elif case.variant == "window":  # for those who have no other way to say it
        mask = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(-WINDOW)
    else:
        mask = None
    return Inputs((*drawn, mask), (0, 1, 2))


def _options(case: Case) -> dict:
    return {
        "is_causal": case.variant in CAUSAL,
        "enable_gqa": case.variant == "gqa",
        "dropout_p": DROPOUT if case.variant.endswith("dropout") else 0.0,
    }


def _call(function, case: Case):
    options = _options(case)
    return lambda q, k, v, mask: function(q, k, v, mask, **options)


def _ours(case: Case):
    if case.variant == "varlen":
        return lambda q, k, v, offsets: fastlm.attention_varlen(q, k, v, offsets, is_causal=True)
    if case.variant == "window":
        return lambda q, k, v, mask: fastlm.scaled_dot_product_attention(q, k, v, is_causal=True, window=(WINDOW, 0))
    if case.variant == "softcap":
        return lambda q, k, v, mask: fastlm.scaled_dot_product_attention(q, k, v, is_causal=True, softcap=SOFTCAP)
    return _call(fastlm.scaled_dot_product_attention, case)


def _stock_softcap(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    T = q.shape[-2]
    scores = SOFTCAP * torch.tanh(q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 / SOFTCAP))
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def _stock_varlen(case: Case):
    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        parts = (x.split(_lengths(case)) for x in (q, k, v))
        each = zip(*([x.transpose(0, 1)[None] for x in part] for part in parts), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in each]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return run


def _stock(case: Case):
    if case.variant == "varlen":
        return _stock_varlen(case)
    if case.variant == "softcap":
        return _stock_softcap
    if case.variant == "window":
        return F.scaled_dot_product_attention
    return _call(F.scaled_dot_product_attention, case)


def _pairs(case: Case) -> int:
    """Pairs of query and key in one head, over the batch."""
    B, _, T, _ = case.shape
    if case.variant == "varlen":
        return sum(n * (n + 1) // 2 for n in _lengths(case))
    if case.variant == "window":
        return B * sum(min(i, WINDOW) + 1 for i in range(T))
    if _options(case)["is_causal"]:
        return B * T * (T + 1) // 2
    return B * T * (1 if case.variant == "decode" else T)


def _counts(case: Case, which: str) -> Counts:
    """Two products forward and five backward (the scores once more), over the pairs that a causal mask leaves."""
    B, H, T, D = case.shape
    kv_heads = H // GQA_GROUP if case.variant == "gqa" else H
    size = case.torch_dtype.itemsize
    tokens = sum(_lengths(case)) if case.variant == "varlen" else B * T
    q, kv = (B if case.variant == "decode" else tokens) * H * D * size, tokens * kv_heads * D * size
    product = 2 * H * _pairs(case) * D
    mask = {"padding": B * T, "bias": H * T * T * size}.get(_mask(case), 0)
    forward = Counts(2 * q + 2 * kv + mask, 2 * product, case.dtype, reads_only=case.variant == "decode")
    backward = Counts(4 * q + 4 * kv + mask, 5 * product, case.dtype)
    return Counts.of(which, forward, backward)


def _sdpa(backend: str, case: Case, device: str):
    """torch's operator held to one of its GPU kernels."""
    need_cuda(device, "a choice of SDPA kernels")
    kernel, choose = attribute("torch.nn.attention", "SDPBackend"), attribute("torch.nn.attention", "sdpa_kernel")
    stock = _stock(case)

    def run(*tensors):
        with choose(getattr(kernel, backend)):
            return stock(*tensors)

    return run


def _flex(case: Case, device: str):
    need_cuda(device, "FlexAttention with a backward pass")
    if case.variant not in ("causal", "full"):
        raise Unavailable("benchmarked without masks only")
    flex = torch.compile(attribute("torch.nn.attention.flex_attention", "flex_attention"))
    block_mask = None
    if case.variant == "causal":
        T = case.shape[2]
        make = attribute("torch.nn.attention.flex_attention", "create_block_mask")
        block_mask = make(lambda b, h, q, k: q >= k, None, None, T, T, device=device)
    return lambda q, k, v, mask: flex(q, k, v, block_mask=block_mask)


def _flash(case: Case, device: str):
    need_cuda(device, "flash-attn")
    if _mask(case) in ("padding", "bias", "window", "softcap", "varlen"):
        raise Unavailable("benchmarked without masks only")
    if case.dtype == "float32":
        raise Unavailable("it takes float16 and bfloat16")
    function, options = attribute("flash_attn", "flash_attn_func"), _options(case)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        heads_last = [t.transpose(1, 2) for t in (q, k, v)]
        out = function(*heads_last, dropout_p=options["dropout_p"], causal=options["is_causal"])
        return out.transpose(1, 2)

    return run


PEERS: dict[str, Callable[[Case, str], Function]] = {
    "sdpa-flash": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "sdpa-cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
    "sdpa-efficient": functools.partial(_sdpa, "EFFICIENT_ATTENTION"),
    "flex": _flex,
    "flash-attn": _flash,
}

ATTENTION = KernelBenchmark(
    "attention", ("B", "H", "T", "D"), VARIANTS, _table, _inputs, _ours, _stock, _counts,
    lambda case: case.shape[2] + case.shape[3], PEERS, ("scaled_dot_product_attention", "attention_varlen"),
    gpu_peers=("sdpa-flash", "sdpa-cudnn", "sdpa-efficient"),
)  # fmt: skip
