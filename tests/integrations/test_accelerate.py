"""fastlm.accelerate and fastlm.restore on modules of torch.nn, of timm's style, and of nobody's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.integrations import rules

E, H, FF, B, T = 24, 3, 37, 2, 7


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, width, hidden, drop=0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(width, hidden), nn.GELU()
        self.drop1, self.norm = nn.Dropout(drop), nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, width), nn.Dropout(drop)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x  # noqa: RET504  (as timm writes it)


class Attention(nn.Module):
    """timm's, with its normalization of queries and keys."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """timm's vision transformer, small."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, E, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, E)), nn.Parameter(torch.randn(1, 17, E))
        self.blocks = nn.Sequential(*(Block(E, H, FF) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(E, eps=1e-6), nn.Linear(E, 5)

    def forward(self, image):
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class MixedModel(nn.Module):
    """Every torch.nn class that is known, in one model."""

    def __init__(self):
        super().__init__()
        encoder = nn.TransformerEncoderLayer(E, H, FF, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 1)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.norm, self.act, self.loss = nn.RMSNorm(E), nn.GELU("tanh"), nn.CrossEntropyLoss()

    def forward(self, x):
        memory = self.encoder(x)
        y = self.decoder(self.norm(x), memory)
        y = y + self.attention(y, memory, memory, need_weights=False)[0]
        return self.loss(self.act(y).flatten(0, 1), torch.arange(B * T) % E)


MODELS = {"vit": (VisionTransformer, (B, 3, 16, 16)), "mixed": (MixedModel, (B, T, E))}
EVERY = pytest.mark.parametrize("name", MODELS)


def build(name):
    make, shape = MODELS[name]
    return make(), torch.randn(shape)


def run(model, x):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters()}


@EVERY
def test_same_results_and_gradients(name):
    model, x = build(name)
    expected = run(model, x)
    report = fastlm.accelerate(model)
    assert len(report.replaced) >= 8
    actual = run(model, x)
    largest = max(result.abs().max().item() for result in expected.values())
    for key, result in expected.items():
        torch.testing.assert_close(actual[key], result, rtol=1e-4, atol=1e-5 * largest, msg=key)


@EVERY
def test_everything_but_the_class_stays_and_comes_back(name):
    model, x = build(name)
    model.eval()
    seen = []
    hooked = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    hooked.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model.half().float()
    classes = {key: type(module) for key, module in model.named_modules()}
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shown, state = repr(model), list(model.state_dict())
    before = model(x)
    calls = len(seen)
    fastlm.accelerate(model)
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert list(model.state_dict()) == state
    assert repr(model) == shown
    assert not model.training
    assert all(isinstance(module, classes[key]) for key, module in model.named_modules())
    torch.testing.assert_close(model(x), before)
    assert len(seen) == 2 * calls
    model(x).sum().backward()
    optimizer.step()  # reaches the same parameters
    assert fastlm.restore(model) > 8
    assert fastlm.restore(model) == 0
    assert all(type(module) is classes[key] for key, module in model.named_modules())
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == attributes
    assert not torch.equal(model(x), before)


@EVERY
def test_copies_compile_and_export(name):
    torch._dynamo.reset()
    model, x = build(name)
    model.eval()
    fastlm.accelerate(model)
    expected = model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), expected)
        assert fastlm.restore(clone) > 8
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_vits_blocks_are_fused():
    model, x = build("vit")
    report = fastlm.accelerate(model)
    assert sum(row.replacement == "fastlm.bias_gelu" for row in report.rows) == 2
    torch.manual_seed(0)
    for mlp in (block.mlp for block in model.blocks):
        mlp.drop1.p = 1.0  # the fused dropout is the module's
        torch.testing.assert_close(mlp(x.new_ones(2, E)), mlp.fc2.bias.expand(2, E))


class ChangedNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class NamedNorm(nn.LayerNorm):
    """Another name, the same forward."""


class RMSNorm(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.weight, self.eps, self.form = nn.Parameter(torch.rand(E)), 1e-5, form

    def forward(self, x):
        variance = x.float().square().mean(-1, keepdim=True)
        if self.form == "l2":
            return self.weight * x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + self.eps)
        if self.form == "eps outside":
            return self.weight * x / (variance.sqrt() + self.eps)
        return (self.weight + (self.form == "offset")) * x * torch.rsqrt(variance + self.eps)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TanhGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


CASES = {
    "changed": (ChangedNorm(E), "its forward is not torch.nn.LayerNorm's"),
    "l2": (RMSNorm("l2"), "it does not compute what fastlm.rms_norm does"),
    "eps outside": (RMSNorm("eps outside"), "it does not compute what fastlm.rms_norm does"),
    "quick": (QuickGELU(), "it does not compute either form of GELU"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_computes_something_else_is_left_alone(name):
    module, reason = CASES[name]
    holder = nn.ModuleList([module])
    report = fastlm.accelerate(holder)
    assert [row.reason for row in report.kept] == [reason]
    assert reason in str(report)
    assert not report.replaced


@pytest.mark.parametrize(
    "module", [NamedNorm(E), RMSNorm("plain"), RMSNorm("offset"), TanhGELU()], ids=lambda m: repr(m)[:20]
)
def test_other_classes_are_known_by_what_they_do(module):
    holder = nn.ModuleList([copy.deepcopy(module)])
    x = torch.randn(5, E, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    assert len(fastlm.accelerate(holder).replaced) == 1
    torch.testing.assert_close(torch.autograd.grad(holder[0](x).square().sum(), x)[0], expected, rtol=1e-4, atol=1e-4)
    assert type(holder[0]).__name__ == type(module).__name__


def test_obstacles_are_named():
    replaced = nn.LayerNorm(E)
    replaced.forward = lambda x: x
    parametrized = nn.utils.parametrize.register_parametrization(nn.LayerNorm(E), "weight", nn.Tanh())
    report = fastlm.accelerate(nn.ModuleDict({"a": replaced, "b": parametrized, "c": nn.LayerNorm(E)}))
    assert [row.reason for row in report.kept] == [
        "its forward was replaced on the instance", "it is parametrized; its class is the parametrization's",
    ]  # fmt: skip
    assert [row.name for row in report.replaced] == ["c"]


def test_a_parametrization_afterwards_works_and_is_named_by_restore():
    model, x = build("vit")
    fastlm.accelerate(model)
    nn.utils.parametrize.register_parametrization(model.norm, "weight", nn.Tanh())
    model(x)
    with pytest.raises(ValueError, match="restore: norm has become"):
        fastlm.restore(model)
    assert type(model.blocks[0].norm1) is fastlm.nn.LayerNorm  # nothing was undone
    nn.utils.parametrize.remove_parametrizations(model.norm, "weight")
    fastlm.restore(model)
    assert type(model.norm) is nn.LayerNorm


def test_ours_by_construction_are_not_restored():
    model = nn.Sequential(fastlm.nn.LayerNorm(E), nn.LayerNorm(E))
    assert len(fastlm.accelerate(model).replaced) == 1
    fastlm.restore(model)
    assert type(model[0]) is fastlm.nn.LayerNorm
    assert type(model[1]) is nn.LayerNorm


def test_a_hook_on_a_fused_part_is_called():
    model, x = build("vit")
    fastlm.accelerate(model)
    seen = []
    model.blocks[0].mlp.act.register_forward_hook(lambda *args: seen.append("act"))
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *args: seen.append("fc1"))
    model(x)
    assert seen == ["act", "fc1"]


def test_the_report_groups_its_lines():
    model, _ = build("vit")
    lines = str(fastlm.accelerate(model)).splitlines()
    assert lines[0].split(" ")[1:] == ["of", lines[0].split(" ")[2], "replaced"]
    assert any("9 x LayerNorm" in line and "fastlm.nn.LayerNorm" in line for line in lines)


def test_derived_classes_are_made_once():
    assert rules.derived(NamedNorm, "LayerNorm") is rules.derived(NamedNorm, "LayerNorm")


def test_a_copy_with_a_forward_of_an_earlier_version_keeps_its_class():
    layer = rules._rebuild(fastlm.nn.Linear, "deferred")  # what the pickle of a model holds
    assert type(layer) is fastlm.nn.Linear
