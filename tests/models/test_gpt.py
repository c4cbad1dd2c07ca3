"""GPT: equal to Hugging Face's GPT-2 in both directions, and right at its edges."""

import contextlib
import dataclasses
import json
import os
import re
import resource

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastlm.errors import CheckpointError, ConfigError
from fastlm.models import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SMALL = GPTConfig(vocab_size=61, context_length=24, n_layer=2, n_head=2, n_embd=16)
CONFIGS = {
    "small": SMALL,
    "odd": GPTConfig(vocab_size=1013, context_length=19, n_layer=3, n_head=3, n_embd=33, layer_norm_eps=1e-3),
    "one-head": GPTConfig(vocab_size=7, context_length=5, n_layer=1, n_head=1, n_embd=8, n_inner=20),
    "untied": dataclasses.replace(SMALL, n_head=4, tie_embeddings=False),
}
# The logits and gradients below are of order 1 to 10; 1e-4 is what the project promises in fp32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def perturbed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter, so that no bias is 0, no norm an identity and no branch negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def their_config(config: GPTConfig, **changes):
    return transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_inner=config.n_inner,
        layer_norm_epsilon=config.layer_norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0} | changes,
    )


def their_model(config: GPTConfig, kind=None):
    torch.manual_seed(0)
    kind = kind or transformers.GPT2LMHeadModel
    return perturbed(kind(their_config(config))).eval()


def our_model(config: GPTConfig = SMALL, **changes) -> GPT:
    torch.manual_seed(0)
    return perturbed(GPT(dataclasses.replace(config, **changes))).eval()


def some_tokens(config: GPTConfig = SMALL, batch: int = 3, length: int | None = None) -> torch.Tensor:
    shape = (batch, config.context_length if length is None else length)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    """A folder that `save_huggingface` wrote."""
    our_model().save_huggingface(tmp_path)
    return tmp_path


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


# Hugging Face


@pytest.mark.parametrize("name", CONFIGS)
def test_loads_their_weights_with_equal_logits_loss_and_gradients(name, tmp_path):
    config = CONFIGS[name]
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_huggingface(tmp_path)
    assert ours.config == config
    tokens = some_tokens(config)
    torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, **CLOSE)

    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    loss = ours(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    for key, parameter in ours.named_parameters():
        other = theirs.get_parameter(key if key == "lm_head.weight" else f"transformer.{key}").grad
        other = other.t() if re.search(r"(c_attn|c_proj|c_fc)\.weight$", key) else other
        torch.testing.assert_close(parameter.grad, other, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_they_load_our_weights_with_equal_logits(name, tmp_path):
    ours = our_model(CONFIGS[name])
    ours.save_huggingface(tmp_path / "new" / "folder", eot_id=3)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.eos_token_id == 3
    assert theirs.dtype == torch.float32
    tokens = some_tokens(CONFIGS[name])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(dtype, tmp_path):
    ours = our_model(dropout=0.25).to(dtype)
    ours.save_huggingface(tmp_path)
    again = GPT.from_huggingface(tmp_path)
    assert again.config == ours.config
    assert again.wte.weight.dtype == torch.float32
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in again.parameters())
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor.float()), key


def test_loads_shards(tmp_path):
    theirs = their_model(SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = GPT.from_huggingface(tmp_path).eval()
    torch.testing.assert_close(ours(some_tokens()), theirs(some_tokens()).logits, **CLOSE)
    missing = sorted(tmp_path.glob("model-*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"{missing.name}: no such file"):
        GPT.from_huggingface(tmp_path)


def test_loads_names_without_prefix_and_ignores_stored_masks(tmp_path):
    theirs = their_model(SMALL, transformers.GPT2Model)
    theirs.save_pretrained(tmp_path)
    masks = {
        "h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    edit_tensors(tmp_path, lambda tensors: tensors.update(masks))
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    ours = GPT.from_huggingface(tmp_path).eval()
    hidden = theirs(some_tokens()).last_hidden_state
    torch.testing.assert_close(ours.hidden(some_tokens()), hidden, **CLOSE)


def test_loads_a_tied_head_stored_with_or_in_place_of_the_embedding(folder):
    expected = GPT.from_huggingface(folder).eval()(some_tokens())
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert torch.equal(GPT.from_huggingface(folder).eval()(some_tokens()), expected)
    edit_tensors(folder, lambda t: t.pop("transformer.wte.weight"))
    assert torch.equal(GPT.from_huggingface(folder).eval()(some_tokens()), expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "missing h.1.ln_2.bias"),
        (lambda t: t.update(odd=torch.zeros(1)), "unexpected odd"),
        (
            lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)}),
            r"h.0.mlp.c_fc.weight has shape \(64, 16\) instead of \(16, 64\)",
        ),
    ],
)
def test_names_tensors_that_do_not_fit(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        GPT.from_huggingface(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 1}, "unexpected h.1.attn.c_attn.bias, .* and 6 more"),
        ({"n_layer": 3}, "missing h.2.attn.c_attn.bias"),
        ({"vocab_size": 62}, r"wte.weight has shape \(61, 16\) instead of \(62, 16\)"),
        ({"n_head": 3}, "n_embd is 16, expected a multiple of n_head 3"),
        ({"n_embd": "16"}, "n_embd is '16', expected an integer"),
        ({"activation_function": "relu"}, 'activation_function is "relu", expected "gelu_new" or'),
        ({"model_type": "bert"}, 'model_type is "bert", expected "gpt2"'),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is true, expected false",
        ),
        ({"tie_word_embeddings": False}, "missing lm_head.weight"),
        ({"attn_pdrop": 0.3}, "attn_pdrop 0.3, resid_pdrop 0.0: fastlm has one rate"),
    ],
)
def test_says_how_the_config_disagrees(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        GPT.from_huggingface(folder)


def test_dropout_can_be_chosen_on_loading(folder):
    edit_config(folder, attn_pdrop=0.3)
    assert GPT.from_huggingface(folder, dropout=0.2).config.dropout == 0.2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "config.json").write_text('{"n_layer": '), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a list"),
        (lambda f: (f / "config.json").write_text('{"n_head": 2}'), "missing vocab_size, n_layer, n_embd"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda f: os.truncate(f / "model.safetensors", 2000), "model.safetensors: cut short"),
        (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors: cut short"),
    ],
)
def test_damaged_files(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        GPT.from_huggingface(folder)


@contextlib.contextmanager
def file_size_limit(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_earlier_files(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = our_model(n_layer=3)
    with file_size_limit(8192), pytest.raises(CheckpointError, match="could not be written"):
        other.save_huggingface(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# The model itself


def test_initialisation():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=512, context_length=256, n_layer=8, n_head=4, n_embd=128, tie_embeddings=False)
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name or "ln_f" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            # The deviation of n normal draws is itself uncertain by std / sqrt(2 n): six of these.
            assert abs(parameter.std().item() - std) < 6 * std / (2 * parameter.numel()) ** 0.5, name
            assert abs(parameter.mean().item()) < 6 * std / parameter.numel() ** 0.5, name


def test_sizes_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    assert model.num_parameters() == 124_439_808  # as published for the smallest GPT-2
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    multiplied += model.wte.weight.numel()
    # Two FLOPs a weight forward and four backward; q k^T and p v over 1024 keys, three times as well.
    expected = 6 * multiplied + 3 * 12 * 2 * (2 * 1024 * 768)
    assert model.flops_per_token(1024) == pytest.approx(expected, rel=2e-3)  # biases and norms are < 0.2 %
    assert model.flops_per_token() - model.flops_per_token(512) == 3 * 12 * 2 * (2 * 512 * 768)


def test_flops_leave_out_tables_that_are_only_looked_up():
    tied, untied = GPT(SMALL), GPT(dataclasses.replace(SMALL, tie_embeddings=False))
    assert untied.num_parameters() == tied.num_parameters() + 61 * 16
    assert untied.flops_per_token() == tied.flops_per_token()


def test_no_token_sees_a_later_one():
    model, tokens = our_model(), some_tokens(length=12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_loss_is_the_mean_over_targets_that_count():
    model, tokens, targets = our_model(), some_tokens(), some_tokens(batch=3).flip(1)
    targets[0, 5:] = -100
    logits = model(tokens)
    expected = -logits.log_softmax(-1)[targets >= 0, targets[targets >= 0]].mean()
    torch.testing.assert_close(model(tokens, targets), expected)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    plain, model = our_model(), our_model(dropout=0.5)
    assert torch.equal(model(some_tokens()), plain(some_tokens()))
    model.train()
    assert not torch.equal(model(some_tokens()), model(some_tokens()))


def test_dropout_on_embeddings_and_both_branches():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, context_length=64, n_layer=1, n_head=2, n_embd=64, dropout=0.25))
    perturbed(model).train()
    seen = {}
    block = model.h[0]
    block.register_forward_pre_hook(lambda module, args: seen.update(x=args[1]))
    block.attn.register_forward_hook(lambda module, args, out: seen.update(attn=out))
    block.mlp.register_forward_hook(lambda module, args, out: seen.update(mlp=out))
    block.register_forward_hook(lambda module, args, out: seen.update(y=out[1]))
    tokens = some_tokens(model.config, batch=4)

    def kept(ratio):
        """Check that each element is either dropped or scaled, and return the share that is kept."""
        on = ratio > 0.5
        torch.testing.assert_close(ratio, on * (1 / 0.75), rtol=0, atol=1e-3)
        return on.float().mean().item()

    model(tokens)
    shares = [kept(seen["x"] / (model.wte(tokens) + model.wpe.weight))]
    for silent, heard in (("mlp", "attn"), ("attn", "mlp")):
        saved = [parameter.clone() for parameter in getattr(block, silent).c_proj.parameters()]
        with torch.no_grad():
            [parameter.zero_() for parameter in getattr(block, silent).c_proj.parameters()]
        model(tokens)
        branch = seen[heard].masked_fill(seen[heard].abs() < 1e-2, torch.nan)
        ratio = ((seen["y"] - seen["x"]) / branch).flatten()
        shares.append(kept(ratio[~ratio.isnan()]))
        with torch.no_grad():
            for parameter, value in zip(getattr(block, silent).c_proj.parameters(), saved, strict=True):
                parameter.copy_(value)
    for share in shares:  # of about 16384 draws: six deviations of sqrt(0.75 * 0.25 / 16384)
        assert abs(share - 0.75) < 0.021


def test_dropout_on_attention_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, context_length=64, n_layer=1, n_head=2, n_embd=64, dropout=0.25))
    attn = model.h[0].attn
    with torch.no_grad():
        attn.c_attn.weight.zero_()
        attn.c_attn.bias.fill_(1.0)  # equal scores and values of 1: each row sums its kept weights
        attn.c_proj.weight.copy_(torch.eye(64))
    x = torch.zeros(8, 64, 64)
    torch.testing.assert_close(attn.eval()(x), torch.ones(8, 64, 64))
    sums = attn.train()(x)[:, -1, ::32]  # the last query weighs 64 keys by 1/64; one value a head
    assert sums.unique().numel() > 4
    torch.testing.assert_close(sums * 48, (sums * 48).round(), rtol=0, atol=1e-3)  # kept ones weigh 1/48
    assert abs(sums.mean().item() - 1) < 6 * (0.25 / 0.75 / 64 / 16) ** 0.5


def test_compiles_without_a_break():
    model, tokens = our_model().train(), some_tokens()
    expected = model(tokens, tokens)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, tokens)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_autocast_keeps_the_residual_stream_in_fp32():
    model, tokens = our_model(), some_tokens()
    streams, branches = [], []
    for block in model.h:
        block.register_forward_hook(lambda module, args, out: streams.append(out[1].dtype))
        block.mlp.register_forward_hook(lambda module, args, out: branches.append(out.dtype))
    expected = model(tokens, tokens)
    streams.clear(), branches.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
    loss.backward()
    assert streams == [torch.float32] * 2
    assert branches == [torch.bfloat16] * 2
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits: each logit, of order 10 here, is off by a few 2^-8 of itself; the mean by less.
    assert abs(loss - expected).item() < 10 * 2**-8
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_fp64_agrees_with_a_plain_formulation():
    model, tokens = our_model(CONFIGS["odd"]).double(), some_tokens(CONFIGS["odd"])
    x = model.wte.weight[tokens] + model.wpe.weight
    visible = torch.ones(19, 19, dtype=torch.bool).tril()

    def norm(x, ln):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * ln.weight + ln.bias

    for block in model.h:
        q, k, v = (
            part.reshape(3, 19, 3, 11).transpose(1, 2) for part in block.attn.c_attn(norm(x, block.ln_1)).split(33, -1)
        )
        scores = (q @ k.mT / 11**0.5).masked_fill(~visible, -torch.inf)
        x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 19, 33))
        h = block.mlp.c_fc(norm(x, block.ln_2))
        h = h * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))
        x = x + block.mlp.c_proj(h)
    expected = F.linear(norm(x, model.ln_f), model.wte.weight)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-11, atol=1e-11)


def test_exports():
    model, tokens = our_model(), some_tokens()
    exported = torch.export.export(model, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens), model(tokens), **CLOSE)


# Bad input


@pytest.mark.parametrize(
    ("tokens", "targets", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), None, r"tokens has shape \(4,\), expected \(batch, length\)"),
        (torch.zeros(1, 4), None, "tokens has dtype torch.float32, expected torch.int64"),
        (torch.zeros(1, 25, dtype=torch.int64), None, "tokens of length 25 does not fit the context of 24"),
        (torch.tensor([[0, 61]]), None, "tokens holds the id 61, expected ids from 0 to 60"),
        (torch.tensor([[0, -1]]), None, "tokens holds the id -1, expected"),
        (torch.tensor([[0, 1]]), torch.tensor([[0, 61]]), "targets holds the id 61, expected"),
        (torch.tensor([[0, 1]]), torch.tensor([[0, -2]]), "targets holds the id -2, expected"),
        (torch.tensor([[0, 1]]), torch.tensor([0, 1]), r"targets has shape \(2,\), expected \(1, 2\)"),
        (torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0]]), "targets has dtype torch.float32"),
    ],
)
def test_refuses_bad_ids(tokens, targets, message):
    with pytest.raises(ValueError, match=message):
        our_model()(tokens, targets)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_input_gives_empty_logits(shape):
    assert our_model()(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 61)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd is 16, expected a multiple of n_head 3"),
        ({"n_layer": 0}, "n_layer is 0, expected an integer of at least 1"),
        ({"vocab_size": 61.0}, "vocab_size is 61.0"),
        ({"n_inner": -1}, "n_inner is -1"),
        ({"dropout": 1.0}, r"dropout is 1.0, expected a number in \[0, 1\)"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"tie_embeddings": "yes"}, "tie_embeddings is 'yes'"),
        ({"n_heads": 2}, "unknown n_heads"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        GPTConfig.from_dict(SMALL.to_dict() | changes)


def test_config_round_trip_through_json():
    for config in CONFIGS.values():
        assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="missing n_embd, missing n_head"):
        GPTConfig.from_dict({"vocab_size": 61, "context_length": 24, "n_layer": 2})
