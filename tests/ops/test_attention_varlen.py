"""attention_varlen: packed sequences against scaled_dot_product_attention of each alone, in fp64."""

import math

import pytest
import torch

import fastlm
from conftest import DTYPES
from fastlm.ops._attention_reference import attention_varlen_ref
from tolerances import assert_as_close_as_torch

# Lengths of the sequences of queries and of keys (None: the same): a single token, an empty sequence, sequences around
# a tile, one long among short ones, more keys than queries and the reverse, queries without keys.
LENGTHS = [
    ([70, 1, 0, 64, 5], None),
    ([3, 150, 2, 63, 65, 1], None),
    ([5, 40, 1, 3], [70, 13, 130, 0]),
    ([300, 20], [290, 260]),
    ([1, 1, 1], [70, 5, 129]),
]
OPTIONS = [
    {},
    {"is_causal": True},
    {"window": (9, 3), "softcap": 1.3},
    {"is_causal": True, "window": (70, None), "scale": 0.3},
    {"softcap": 2.0},
]


def _offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _packed(lengths, dtype=torch.float32, H=4, Hkv=2, D=32, Dv=24):
    queries, keys = lengths[0], lengths[1] or lengths[0]
    shapes = (sum(queries), H, D), (sum(keys), Hkv, D), (sum(keys), Hkv, Dv)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return leaves, _offsets(queries), None if lengths[1] is None else _offsets(keys)


def _one_by_one(q, k, v, cu_q, cu_k, options):
    """Each sequence through the reference of the dense op."""
    outs, sums = [], []
    ends = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    with fastlm.backend("reference"):
        for i0, i1, j0, j1 in ends:
            parts = (x[a:b].transpose(0, 1)[None] for x, a, b in ((q, i0, i1), (k, j0, j1), (v, j0, j1)))
            out, lse = fastlm.scaled_dot_product_attention(*parts, enable_gqa=True, return_lse=True, **options)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "options"), list(zip(LENGTHS, OPTIONS, strict=True)), ids=str)
def test_parity(attention_kernels, poisoned, lengths, options, dtype):
    leaves, cu_q, cu_k = _packed(lengths, dtype)
    keys = cu_q if cu_k is None else cu_k
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth, truth_lse = _one_by_one(*doubles, cu_q, keys, options)
    own, _ = _one_by_one(*leaves, cu_q, keys, options)
    out, lse = fastlm.attention_varlen(*leaves, cu_q, cu_k, return_lse=True, **options)
    assert out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_close_as_torch(out, truth, own, 300, "out")
    assert_as_close_as_torch(lse.to(dtype), truth_lse, truth_lse.to(dtype), 300, "lse")
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    dlse[truth_lse.isinf()] = 0
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse.to(lse.dtype)))
    expected = torch.autograd.grad((truth, truth_lse), doubles, (dout.double(), dlse.double()))
    for name, g, e in zip(("dq", "dk", "dv"), grads, expected, strict=True):
        assert_as_close_as_torch(g, e, e.to(dtype), 1200, name)


def test_rows_without_keys_give_zero():
    leaves, cu_q, cu_k = _packed(([3, 2], [0, 4]))
    out, lse = fastlm.attention_varlen(*leaves, cu_q, cu_k, return_lse=True)
    assert out[:3].eq(0).all()
    assert lse[:, :3].eq(-math.inf).all()
    assert torch.autograd.grad(out.sum(), leaves[0])[0][:3].eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_depend_on_its_neighbours(attention_kernels, dtype):
    """The same bits alone as between others, forward and backward."""
    lengths = [130, 67, 1, 300]
    leaves, cu, _ = _packed((lengths, None), dtype)
    out = fastlm.attention_varlen(*leaves, cu, is_causal=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    for b, length in enumerate(lengths):
        part = slice(int(cu[b]), int(cu[b + 1]))
        alone = [x.detach()[part].requires_grad_() for x in leaves]
        single = fastlm.attention_varlen(*alone, _offsets([length]), is_causal=True)
        assert torch.equal(out[part], single)
        for g, e in zip(grads, torch.autograd.grad(single, alone, dout[part]), strict=True):
            assert torch.equal(g[part], e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(every_isa, threads, dtype):
    leaves, cu, _ = _packed(([200, 3, 90, 301], None), dtype)
    results = []
    for n in (1, 2, 5, 2):
        threads(n)
        out, lse = fastlm.attention_varlen(*leaves, cu, window=(100, 30), return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(attention_kernels, poisoned, dtype):
    """A mask of (head, packed query, key within the sequence), the same forward and backward as in the reference."""
    leaves, cu_q, cu_k = _packed(([5, 70, 33], [90, 40, 3]), dtype)
    torch.manual_seed(5)
    out = fastlm.attention_varlen(*leaves, cu_q, cu_k, dropout_p=0.25)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with fastlm.backend("reference"):
        torch.manual_seed(5)
        truth = fastlm.attention_varlen(*doubles, cu_q, cu_k, dropout_p=0.25)
        torch.manual_seed(5)
        own = fastlm.attention_varlen(*leaves, cu_q, cu_k, dropout_p=0.25)
    assert_as_close_as_torch(out, truth, own, 90)
    dout = torch.randn(out.shape).to(dtype)
    theirs = torch.autograd.grad(own, leaves, dout)
    expected = torch.autograd.grad(truth, doubles, dout.double())
    for g, e, s in zip(torch.autograd.grad(out, leaves, dout), expected, theirs, strict=True):
        assert_as_close_as_torch(g, e, s, 360)


def test_dropout_of_one_sequence_is_the_dense_mask():
    """Row h Tq + i and column j: for a single sequence that is (b H + h) T + i with b = 0."""
    q, k, v = (torch.randn(9, 3, 8) for _ in range(3))
    torch.manual_seed(2)
    packed = fastlm.attention_varlen(q, k, v, _offsets([9]), dropout_p=0.5)
    torch.manual_seed(2)
    dense = fastlm.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), dropout_p=0.5)
    torch.testing.assert_close(packed, dense[0].transpose(0, 1))


def test_any_strides(attention_kernels, poisoned):
    """A fused projection, and last dimensions that are not contiguous."""
    cu = _offsets([70, 13])
    qkv = torch.randn(83, 3, 2, 16, requires_grad=True)
    out = fastlm.attention_varlen(*qkv.unbind(1), cu, is_causal=True)
    dense = [x.detach().contiguous().requires_grad_() for x in qkv.unbind(1)]
    plain = fastlm.attention_varlen(*dense, cu, is_causal=True)
    assert torch.equal(out, plain)
    dout = torch.randn(2, 16, 83).permute(2, 0, 1)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(plain, dense, dout), 1))
    swapped = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in dense]
    assert torch.equal(plain, fastlm.attention_varlen(*swapped, cu, is_causal=True))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths):
    leaves, cu, _ = _packed((lengths, None))
    out, lse = fastlm.attention_varlen(*leaves, cu, return_lse=True)
    assert out.shape == (0, 4, 24)
    assert lse.shape == (4, 0)
    if lengths:
        for g, x in zip(torch.autograd.grad(out.sum() + lse.sum(), leaves), leaves, strict=True):
            assert g.shape == x.shape


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    leaves, cu_q, cu_k = _packed(([3, 2], [2, 4]), torch.float64, D=3, Dv=2)

    def attend(q, k, v):
        torch.manual_seed(3)
        return fastlm.attention_varlen(
            q, k, v, cu_q, cu_k, dropout_p=dropout_p, window=(2, 1), softcap=0.8, return_lse=True
        )

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operator(dropout_p):
    leaves, cu_q, cu_k = _packed(([3, 0, 5], [4, 2, 5]))
    seed = torch.tensor(7) if dropout_p else None
    args = (*leaves, cu_q, cu_k, seed, False, 0.3, dropout_p, 2, -1, 1.1)
    torch.library.opcheck(torch.ops.fastlm.attention_varlen.default, args)
    out, lse = torch.ops.fastlm.attention_varlen(*args)
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    truth, truth_lse = attention_varlen_ref(
        *leaves, cu_q, cu_k, False, 0.3, dropout_p, 7 if dropout_p else 0, 2, -1, 1.1
    )
    expected = torch.autograd.grad(truth.sum() + truth_lse.sum(), leaves)
    for a, b in zip((out, lse, *grads), (truth, truth_lse, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with fastlm.backend("reference"):
        by_reference = torch.ops.fastlm.attention_varlen(*args)
        formula = torch.autograd.grad(by_reference[0].sum() + by_reference[1].sum(), leaves)
    for a, b in zip(formula, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    backward = (torch.randn_like(out), torch.randn_like(lse), *leaves, cu_q, cu_k, seed, out, lse, *args[6:])
    backward = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(torch.ops.fastlm.attention_varlen_backward.default, backward)


def test_compile():
    """One graph whatever the lengths are."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attend(q, k, v, cu):
        return fastlm.attention_varlen(q, k, v, cu, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    counted = torch.compile(attend, fullgraph=True, backend=count)
    for lengths in ([4, 5], [1, 8]):
        leaves, cu, _ = _packed((lengths, None))
        mine, expected = compiled(*leaves, cu), attend(*leaves, cu)
        assert torch.equal(mine, expected)
        for a, b in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (mine, expected)), strict=True):
            torch.testing.assert_close(a, b)
        counted(*(x.detach() for x in leaves), cu)
    assert len(graphs) == 1


def test_autocast():
    leaves, cu, _ = _packed(([9, 4], None))
    with torch.autocast("cpu", torch.bfloat16):
        out = fastlm.attention_varlen(*leaves, cu)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fastlm.attention_varlen(*(x.bfloat16() for x in leaves), cu))


Q = torch.zeros(9, 4, 8)
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
BAD = [
    ((Q[None], Q[None], Q[None], CU), ValueError, r"query has 4 dimensions, expected 3: \(tokens, heads, head size\)"),
    ((Q, Q, Q[:8], CU), ValueError, "value has 8 tokens, expected 9 to match key"),
    ((Q, Q, Q[:, :2], CU), ValueError, "value has 2 heads, expected 4 to match key"),
    ((Q, Q[:, :3], Q[:, :3], CU), ValueError, "key has 3 heads, expected a divisor of query's 4"),
    ((Q, Q, Q, CU.long()), TypeError, "cu_seqlens_q has dtype torch.int64, expected torch.int32"),
    ((Q, Q, Q, CU[None]), ValueError, r"cu_seqlens_q has shape \(1, 3\), expected \(sequences \+ 1,\)"),
    ((Q, Q, Q, CU, CU[:2]), ValueError, "cu_seqlens_k has 2 offsets, expected 3 as cu_seqlens_q has"),
    ((Q, Q, Q, CU[:2]), ValueError, r"cu_seqlens_q is \[0, 4\], expected to rise from 0 to query's 9 tokens"),
    ((Q, Q[:7], Q[:7], CU), ValueError, "cu_seqlens_k is .*, expected to rise from 0 to key's 7 tokens"),
    ((Q, Q, Q, torch.tensor([0, 7, 4, 9]).int()), ValueError, "cu_seqlens_q is .*, expected to rise from 0"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[case[2][:30] for case in BAD])
def test_bad_input(args, error, message):
    with pytest.raises(error, match="attention_varlen: " + message):
        fastlm.attention_varlen(*args)
