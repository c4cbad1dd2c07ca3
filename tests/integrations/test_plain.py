"""What others hang on a block's parts is respected: ways to alter a module, times the blocks that fuse."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastlm.nn
from fastlm.models import BERT, GPT, BERTConfig, GPTConfig, Llama, LlamaConfig, Seq2Seq, Seq2SeqConfig
from fastlm.nn._plain import plain

C, H, FF, B, T, V = 16, 2, 20, 2, 5, 31
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class TimmMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(C, FF), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.LayerNorm(FF), nn.Linear(FF, C), nn.Dropout(0.0)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x  # noqa: RET504  (as timm writes it)


def x():
    return torch.linspace(-2, 2, B * T * C).sin().view(B, T, C).requires_grad_()


def theirs(name, **sizes):
    transformers = pytest.importorskip("transformers")
    zero = dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
    )
    config = getattr(transformers, f"{name}Config")(**sizes)
    for key, value in zero.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return getattr(transformers, f"{name}Model")(config)


SIZES = {"hidden_size": C, "num_hidden_layers": 1, "num_attention_heads": H, "intermediate_size": FF}
LAYER = {"dropout": 0.0, "activation": F.gelu, "batch_first": True}
# name: (torch's, timm's or transformers' module, what goes in); fastlm.accelerate is what fuses it
STOCK = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(C, H, FF, **LAYER), lambda: (x(),)),
    "pre-norm encoder layer": (
        lambda: nn.TransformerEncoderLayer(C, H, FF, **LAYER | {"norm_first": True, "activation": nn.GELU()}),
        lambda: (x(),),
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(C, H, FF, norm_first=True, **LAYER),
        lambda: (x(), x().flip(1)),
    ),
    "timm": (TimmMlp, lambda: (x(),)),
    "bert": (lambda: theirs("Bert", vocab_size=V, **SIZES).encoder.layer[0], lambda: (x(),)),
    "gpt2": (lambda: theirs("GPT2", vocab_size=V, n_embd=C, n_layer=1, n_head=H, n_inner=FF).h[0], lambda: (x(),)),
    "vit": (lambda: theirs("ViT", image_size=8, patch_size=4, **SIZES).layers[0], lambda: (x(),)),
    "clip": (lambda: theirs("CLIPVision", image_size=8, patch_size=4, hidden_act="gelu", **SIZES), None),
    "llama": (lambda: theirs("Llama", vocab_size=V, **SIZES).layers[0].mlp, lambda: (x(),)),
}
OWN_SIZES = {"vocab_size": V, "context_length": 8, "n_head": H, "n_embd": C}


def ids():
    return torch.arange(B * T).view(B, T) % (V - 3) + 3


OWN = {
    "GPT": (
        lambda: GPT(GPTConfig(**OWN_SIZES, n_layer=2, tie_embeddings=False)),
        lambda model: (model(ids()), model(ids(), ids())),
    ),
    "Llama": (
        lambda: Llama(LlamaConfig(**OWN_SIZES, n_layer=2, n_kv_head=1, n_inner=FF, tie_embeddings=False)),
        lambda model: (model(ids()), model(ids(), ids())),
    ),
    "BERT": (
        lambda: BERT(BERTConfig(**OWN_SIZES, n_layer=1, dropout=0.0, attention_dropout=0.0)),
        lambda model: (model(ids()), model.loss(ids(), ids())),
    ),
    "Seq2Seq": (
        lambda: Seq2Seq(
            Seq2SeqConfig(
                **OWN_SIZES, n_encoder_layer=1, n_decoder_layer=1, dropout=0.0, activation="gelu", positions="learned"
            )
        ),
        lambda model: (model(ids(), ids()), model.loss(ids(), ids())),
    ),
}


def perturbed(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def stock(name):
    make, inputs = STOCK[name]
    model = perturbed(make())
    if name == "clip":
        model, inputs = next(m for m in model.modules() if type(m).__name__ == "CLIPMLP"), lambda: (x(),)
    return model, inputs


class Halved(nn.Module):
    """Weight of a parametrization."""

    def forward(self, weight):
        return weight / 2


class LoRA(nn.Module):
    """As peft's: the layer, its weight within reach, and a product of two small matrices."""

    def __init__(self, base, seen):
        super().__init__()
        self.base_layer, self.seen = base, seen
        rows, columns = base.weight.shape if isinstance(base, nn.Linear) else base.weight.shape[::-1]
        self.down, self.up = nn.Linear(columns, 2, bias=False), nn.Linear(2, rows, bias=False)
        nn.init.constant_(self.down.weight, 0.1)
        nn.init.constant_(self.up.weight, 0.1)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        self.seen.append(1)
        return self.base_layer(x) + self.up(self.down(x))


class Doubling(torch.Tensor):
    """A weight that stands for its double in every function but those that make a parameter of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.addmm, F.layer_norm):
            with torch._C.DisableTorchFunctionSubclass():
                args = [2 * a.as_subclass(torch.Tensor) if isinstance(a, Doubling) else a for a in args]
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def halved(output):
    return output / 2 if isinstance(output, torch.Tensor) else (output[0] / 2, *output[1:])


def hook(model, name, seen):
    model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(1) or halved(out))


def pre_hook(model, name, seen):
    child = model.get_submodule(name)
    child.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(1) or ((args[0] / 2, *args[1:]), kwargs), with_kwargs=True
    )


def backward_hook(model, name, seen):
    model.get_submodule(name).register_full_backward_hook(lambda m, d_in, d_out: seen.append(1))


def backward_pre_hook(model, name, seen):
    model.get_submodule(name).register_full_backward_pre_hook(lambda m, d_out: seen.append(1))


def global_hook(model, name, seen):
    child = model.get_submodule(name)
    return nn.modules.module.register_module_forward_hook(
        lambda m, args, out: (seen.append(1) or halved(out)) if m is child else None
    )


def instance_forward(model, name, seen):
    child = model.get_submodule(name)
    before = child.forward
    child.forward = lambda *args, **kwargs: seen.append(1) or halved(before(*args, **kwargs))


def instance_call(model, name, seen):
    child = model.get_submodule(name)
    child.__dict__["__call__"] = lambda *args, **kwargs: seen.append("which no call reaches")


def instance_call_impl(model, name, seen):
    child = model.get_submodule(name)
    before = child._call_impl
    child._call_impl = lambda *args, **kwargs: seen.append(1) or halved(before(*args, **kwargs))


def accelerates_hook(model, name, seen):
    hooks = pytest.importorskip("accelerate.hooks")

    class Hook(hooks.ModelHook):
        def post_forward(self, module, output):
            seen.append(1)
            return halved(output)

    hooks.add_hook_to_module(model.get_submodule(name), Hook())


def subclass(model, name, seen):
    child = model.get_submodule(name)
    kind = type(child)

    class Other(kind):
        def forward(self, *args, **kwargs):
            seen.append(1)
            return halved(super().forward(*args, **kwargs))

    child.__class__ = Other


def lora(model, name, seen):
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, LoRA(model.get_submodule(name), seen))


def parametrized(model, name, seen):
    parametrize.register_parametrization(model.get_submodule(name), "weight", Halved())


def spectral_norm(model, name, seen):
    parametrizations.spectral_norm(model.get_submodule(name))


def old_spectral_norm(model, name, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model.get_submodule(name))


def old_weight_norm(model, name, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.get_submodule(name))
    model.get_submodule(name).weight_g.data.mul_(0.5)


def pruned(model, name, seen):
    prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)


def tensor_subclass(model, name, seen):
    child = model.get_submodule(name)
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Doubling), requires_grad=False)
    assert type(child.weight) is Doubling


def quantized(model, name, seen):
    kind = torch.ao.nn.quantized.dynamic.Linear
    child = model.get_submodule(name)
    if not isinstance(child, nn.Linear):
        return
    layer = kind(child.in_features, child.out_features)
    weight, bias = (None if p is None else p.detach() for p in (child.weight, child.bias))
    layer.set_weight_bias(torch.quantize_per_tensor(weight, weight.abs().max().item() / 127, 0, torch.qint8), bias)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


OF_CALLS = [
    hook, pre_hook, backward_hook, backward_pre_hook, global_hook, instance_forward, instance_call,
    instance_call_impl, accelerates_hook, subclass,
]  # fmt: skip
OF_WEIGHTS = [
    lora, parametrized, spectral_norm, old_spectral_norm, old_weight_norm, pruned, tensor_subclass, quantized
]  # fmt: skip


def children(model, way):
    """Names of the parts that a way alters: those without parts, of weights those with a matrix."""
    for name, module in model.named_modules():
        if not name or list(module.children()):
            continue
        if name.endswith("attn.out_proj") and way in (lora, quantized, tensor_subclass):
            continue  # torch's MultiheadAttention reads its weight, as part of a larger function
        if isinstance(module, nn.Embedding) and way in (pre_hook, backward_hook, backward_pre_hook):
            continue  # what goes in are integers
        matrix = isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 2
        if way in OF_CALLS or (matrix and not isinstance(module, nn.Embedding)):
            yield name


def results(model, run, way, name, seen):
    torch.manual_seed(0)
    handle = way(model, name, seen)
    try:
        with torch.set_grad_enabled(way is not quantized):
            outputs = run(model)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(y, torch.Tensor)]
        if way is not quantized:
            sum(y.square().sum() for y in outputs).backward()
    finally:
        if handle is not None:
            handle.remove()
    return [y.detach() for y in outputs]


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("way", OF_CALLS + OF_WEIGHTS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", STOCK)
def test_an_altered_part_of_a_fused_block_acts_as_in_the_stock_block(name, way):
    model, inputs = stock(name)
    ours = copy.deepcopy(model)
    assert fastlm.accelerate(ours).replaced
    altered = list(children(model, way))
    assert altered
    for part in altered:
        expected, actual = [], []
        truth = results(copy.deepcopy(model), lambda m: m(*inputs()), way, part, expected)
        found = results(copy.deepcopy(ours), lambda m: m(*inputs()), way, part, actual)
        assert actual == expected, part
        for y, z in zip(found, truth, strict=True):
            torch.testing.assert_close(y, z, **CLOSE, msg=lambda text, part=part: f"{part}: {text}")


class Wrapped(nn.Module):
    """The part within a module of another class, which can only be called, and what a way does to it there."""

    def __init__(self, part, way, seen):
        super().__init__()
        self.part = part
        torch.manual_seed(0)
        way(self, "part", seen)

    def forward(self, *args, **kwargs):
        return self.part(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [w for w in OF_CALLS + OF_WEIGHTS if w not in (global_hook, quantized)], ids=lambda way: way.__name__
)
@pytest.mark.parametrize("name", OWN)
def test_an_altered_part_of_our_models_is_called(name, way):
    make, run = OWN[name]
    torch.manual_seed(0)
    model = perturbed(make())
    for part in children(model, way):
        if part in ("wte", "dropout"):  # the embedding that is the head, too, is read
            continue
        wrapped, altered = copy.deepcopy(model), copy.deepcopy(model)
        expected, actual = [], []
        parent, _, attribute = part.rpartition(".")
        holder = wrapped.get_submodule(parent)
        setattr(holder, attribute, Wrapped(wrapped.get_submodule(part), way, expected))
        truth = results(wrapped, run, lambda *args: None, part, expected)
        found = results(altered, run, way, part, actual)
        assert actual == expected, part
        for y, z in zip(found, truth, strict=True):
            torch.testing.assert_close(y, z, **CLOSE, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", [*STOCK, "GPT", "Llama"])
def test_offloaded_blocks_run(name, place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if name in OWN:
        make, run = OWN[name]
        model = perturbed(make())
    else:
        model, inputs = stock(name)
        fastlm.accelerate(model)

        def run(model):
            return model(*inputs())

    with torch.no_grad():
        expected = run(model)
        if place == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        assert all(p.is_meta for p in model.parameters())
        torch.testing.assert_close(run(model), expected, **CLOSE)


def test_accelerate_after_offloading_works_too():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = stock("gpt2")
    expected = model(*inputs())
    accelerate.cpu_offload(model, execution_device="cpu")
    fastlm.accelerate(model)
    torch.testing.assert_close(model(*inputs()), expected, **CLOSE)


def test_a_removed_hook_of_accelerates_leaves_a_part_plain():
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(3, 3)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert not plain(layer, nn.Linear)
    hooks.remove_hook_from_module(layer)
    assert "forward" in layer.__dict__
    assert plain(layer, nn.Linear)


def test_an_activation_put_in_the_place_of_silu_is_used():
    model, _ = stock("llama")
    fastlm.accelerate(model)
    long = torch.randn(1, 8, C).requires_grad_()  # in training the gate is fused
    model.act_fn = nn.Tanh()
    expected = model.down_proj(torch.tanh(model.gate_proj(long)) * model.up_proj(long))
    torch.testing.assert_close(model(long), expected, **CLOSE)


def test_a_hook_on_a_block_of_ours_changes_what_follows():
    """The next block's norm is not computed before the hook."""
    make, _ = OWN["GPT"]
    model = perturbed(make()).eval()
    seen = {}
    model.h[1].ln_1.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    model.h[0].register_forward_hook(lambda m, args, out: (out[0], out[1] + 1.0))
    handle = model.h[1].register_forward_pre_hook(lambda m, args: seen.update(given=args[1]))
    model(ids())
    handle.remove()
    assert torch.equal(seen["x"], seen["given"])


def test_hooks_and_foreign_attention_get_padded_tokens_from_an_unpadded_encoder():
    model = theirs("Bert", vocab_size=V, **SIZES)
    reference = copy.deepcopy(perturbed(model)).eval()
    fastlm.accelerate(model.eval(), unpad=True)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, -2:] = 0
    expected = reference(ids(), mask).last_hidden_state
    seen = []
    model.encoder.layer[0].output.dense.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(ids(), mask).last_hidden_state[mask.bool()], expected[mask.bool()], **CLOSE)
    assert seen == [(B, T, C)]
