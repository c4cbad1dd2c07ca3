"""What the tests of Llama's relatives share: one model of theirs and ours, compared in every way of using it."""

from __future__ import annotations

import torch

import fastlm
from fastlm.inference import KVCache, generate
from hf import CLOSE, check_gradients, perturbed, reload_as_theirs, transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODULES = {
    "wte": "embed_tokens",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "out": "o_proj",
    "down": "down_proj",
}


def their_model(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    return perturbed(getattr(transformers, f"{family}ForCausalLM")(config))


def some_tokens(batch=3, length=13):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def load_as_ours(theirs, folder):
    theirs.save_pretrained(folder)
    return fastlm.load(folder)


def their_names(ours, stacked):
    """The names in transformers of the tensors that one of ours is stacked from."""
    path = [MODULES.get(part, part) for part in ours.split(".")]
    names = [[*path[:-2], part, path[-1]] for part in stacked.get(path[-2], (path[-2],))]
    return tuple(("" if path[0] == "lm_head" else "model.") + ".".join(name) for name in names)


def check_logits_loss_and_gradients(ours, theirs, stacked, length=13):
    tokens = some_tokens(length=length)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **CLOSE)
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    loss = ours(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    check_gradients(ours, theirs, {name: their_names(name, stacked) for name, _ in ours.named_parameters()})


def check_saved(ours, theirs, folder):
    """Transformers reads what is saved: the same names, shapes, configuration and logits; and so do we."""
    fastlm.save(ours, folder)
    again = reload_as_theirs(type(theirs), folder)
    state = again.state_dict()
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in theirs.state_dict().items()}
    expected, got = theirs.config.to_dict(), again.config.to_dict()
    about = ("_name_or_path", "transformers_version", "dtype", "architectures")
    assert [(name, expected.get(name), got.get(name)) for name in expected.keys() | got.keys() - set(about)
            if name not in about and expected.get(name) != got.get(name)] == []  # fmt: skip
    torch.testing.assert_close(again(some_tokens()).logits, theirs(some_tokens()).logits, rtol=0, atol=0)
    loaded = fastlm.load(folder)
    assert (loaded.config, loaded.config.family) == (ours.config, ours.config.family)


def check_generation(ours, theirs, steps=20, length=6):
    tokens = some_tokens(length=length)
    new = torch.stack(list(generate(ours, tokens, steps, temperature=0.0)), 1)
    settings = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    assert torch.equal(new, expected[:, length:])


def check_cache(ours, pieces):
    tokens, cache = some_tokens(length=sum(pieces)), KVCache(ours.config, 3)
    with torch.no_grad():
        parts = [ours(part.contiguous(), cache=cache) for part in tokens.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), ours(tokens), **CLOSE)


def check_steps(ours, theirs, steps=5):
    """Some steps of AdamW from the same start give the same losses: the weights follow each other."""
    tokens = some_tokens(length=12)
    ours.train(), theirs.train()
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (ours, theirs)]
    losses = []
    for _ in range(steps):
        pair = (
            ours(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()),
            theirs(tokens, labels=tokens).loss,
        )
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(torch.stack([loss.detach() for loss in pair]))
    ours_lost, theirs_lost = torch.stack(losses).unbind(1)
    torch.testing.assert_close(ours_lost, theirs_lost, **CLOSE)
    assert theirs_lost[-1] < theirs_lost[0]
