"""Generation: the cache changes nothing, and draws follow the distribution."""

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from fastlm.errors import CheckpointError, ConfigError
from fastlm.inference import KVCache, generate, sample
from fastlm.inference.sampling import candidates
from fastlm.models import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=31, context_length=16, n_layer=2, n_head=2, n_embd=16)


def random_model(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def prompts(batch: int = 3, length: int = 5, vocab_size: int = 31) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def collect(*args, **kwargs) -> torch.Tensor:
    return torch.stack(list(generate(*args, **kwargs)), 1)


def generate_uncached(model, tokens, count, seed=None, **settings):
    """The documented rule, step by step: read the whole window anew for every token."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    context, drawn = model.config.context_length, []
    window = tokens[:, -context:]
    for _ in range(count):
        if window.shape[1] > context:
            window = window[:, -(context // 2) :]
        with torch.no_grad():
            new = sample(model(window)[:, -1], generator=generator, **settings)
        drawn.append(new)
        window = torch.cat([window, new[:, None]], 1)
    return torch.stack(drawn, 1)


# The cache


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 1, 3, 6], [1, 15]])
def test_cached_logits_equal_uncached(chunks):
    model, tokens = random_model(), prompts(length=16)
    cache = KVCache(CONFIG, 3)
    with torch.no_grad():
        expected = model(tokens)
        logits = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, 1)], 1)
    assert cache.length == 16
    # fp32 sums of 16 to 64 terms of order 1, taken in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_cleared_cache_starts_anew():
    model, tokens = random_model(), prompts()
    cache = KVCache(CONFIG, 3)
    with torch.no_grad():
        first = model(tokens, cache=cache)
        cache.clear()
        assert torch.equal(model(tokens, cache=cache), first)


SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3},
    "cool": {"seed": 4, "temperature": 0.5},
    "top-k": {"seed": 5, "top_k": 4},
    "top-p": {"seed": 6, "top_p": 0.7},
    "both": {"seed": 7, "temperature": 1.3, "top_k": 9, "top_p": 0.8},
}


@pytest.mark.parametrize("length", [1, 5, 16, 23], ids=lambda length: f"prompt-{length}")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_cached_generation_equals_uncached_past_the_context(settings, length):
    model, tokens = random_model(), prompts(length=length)
    got = collect(model, tokens, 40, **settings)
    assert got.shape == (3, 40)
    assert got.dtype == torch.int64
    assert torch.equal(got, generate_uncached(model, tokens, 40, **settings))


def test_the_shortest_context_works():
    model = random_model(GPTConfig(vocab_size=31, context_length=1, n_layer=1, n_head=1, n_embd=8))
    token, tokens = prompts(1, 1), []
    for _ in range(6):
        token = model(token).argmax(-1)
        tokens.append(token)
    assert torch.equal(collect(model, prompts(1, 1), 6, temperature=0), torch.cat(tokens, 1))


def test_a_row_does_not_depend_on_its_batch():
    model, tokens = random_model(), prompts()
    together = collect(model, tokens, 30, temperature=0)
    for row in range(3):
        assert torch.equal(collect(model, tokens[row : row + 1], 30, temperature=0)[0], together[row])


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_cache_takes_the_dtype_of_the_model(name):
    model = random_model().to(getattr(torch, name))
    tokens = collect(model, prompts(), 20, temperature=0)
    assert tokens.shape == (3, 20)
    if name == "float64":
        assert torch.equal(tokens, generate_uncached(model, prompts(), 20, temperature=0))


def test_runs_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert collect(random_model(), prompts(), 20, temperature=0).shape == (3, 20)


def test_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_layer=2, n_head=2, n_embd=16, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ours = GPT(GPTConfig(31, 32, 2, 2, 16))
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    del state["lm_head.weight"]
    linear = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
    ours.load_state_dict({name: t.t() if linear.search(name) else t for name, t in state.items()})
    tokens = prompts()
    mask = torch.ones_like(tokens)
    expected = theirs.generate(tokens, attention_mask=mask, max_new_tokens=27, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat([tokens, collect(ours, tokens, 27, temperature=0)], 1), expected)


# The loop


def test_seeds():
    model, tokens = random_model(), prompts()
    before = torch.get_rng_state()
    first = collect(model, tokens, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(collect(model, tokens, 20, seed=1), first)
    assert not torch.equal(collect(model, tokens, 20, seed=2), first)
    torch.manual_seed(9)
    unseeded = collect(model, tokens, 20)
    assert not torch.equal(collect(model, tokens, 20), unseeded)
    torch.manual_seed(9)
    assert torch.equal(collect(model, tokens, 20), unseeded)


def test_finished_rows_repeat_the_stop_token_and_all_finished_ends():
    model, tokens = random_model(), prompts(batch=4)
    free = collect(model, tokens, 60, seed=0)
    stop = next(t for t in range(31) if (free == t).any(1).all() and len({row.index(t) for row in free.tolist()}) > 1)
    ends = [row.index(stop) for row in free.tolist()]
    # Rows draw from one generator in turn, so a row that is done leaves the draws of the others as they were
    # only up to the first end; from there on compare each row with itself being done.
    got = collect(model, tokens, 60, seed=0, stop_token=stop)
    assert torch.equal(got[:, : min(ends) + 1], free[:, : min(ends) + 1])
    firsts = [row.index(stop) for row in got.tolist()]
    assert got.shape[1] == max(firsts) + 1
    for row, first in zip(got.tolist(), firsts, strict=True):
        assert set(row[first:]) == {stop}


def test_the_model_is_evaluated_and_then_as_it_was():
    model = random_model(GPTConfig(31, 16, 2, 2, 16, dropout=0.5)).train()
    steps = generate(model, prompts(), 8, temperature=0)
    assert model.training
    first = next(steps)
    assert not model.training
    steps.close()
    assert model.training
    assert torch.equal(torch.stack(list(generate(model, prompts(), 8, temperature=0)))[0], first)
    assert model.training


def test_open_iterators_share_evaluation_mode_and_the_last_restores_it():
    model = random_model(GPTConfig(31, 16, 2, 2, 16, dropout=0.5)).train()
    alone = torch.stack(list(generate(model, prompts(), 8, temperature=0)))
    first, second = (generate(model, prompts(), 8, temperature=0) for _ in range(2))
    tokens = [next(first), next(second)]
    assert torch.equal(tokens[0], tokens[1])
    first.close()
    assert not model.training  # the other one still is under way
    assert torch.equal(torch.stack([tokens[1], *second]), alone)
    assert model.training


@pytest.mark.parametrize("how", ["dropped", "thrown into", "model fails"])
def test_an_iterator_that_ends_early_leaves_every_module_as_it_was(how):
    model = random_model(GPTConfig(31, 16, 2, 2, 16, dropout=0.5)).train()
    model.h[0].eval()  # a frozen block stays in evaluation mode
    modes = [module.training for module in model.modules()]
    steps = generate(model, prompts(), 8, temperature=0)
    next(steps)
    assert not any(module.training for module in model.modules())
    if how == "dropped":
        del steps
    elif how == "thrown into":
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt)
    else:
        handle = model.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(generate(model, prompts(), 8, temperature=0))
        handle.remove()
        assert not any(module.training for module in model.modules())
        steps.close()
    assert [module.training for module in model.modules()] == modes


def test_training_between_two_tokens_does_not_bring_dropout_into_the_second():
    model = random_model(GPTConfig(31, 16, 2, 2, 16, dropout=0.5))
    expected = torch.stack(list(generate(model, prompts(), 8, temperature=0)))
    steps = generate(model, prompts(), 8, temperature=0)
    tokens = [next(steps)]
    for _ in range(7):
        model.train()
        tokens.append(next(steps))
        assert not model.training
    assert torch.equal(torch.stack(tokens), expected)
    assert next(steps, None) is None
    assert model.training  # as it was put last


def test_threads_that_generate_leave_a_training_model_in_training_mode():
    model = random_model(GPTConfig(31, 16, 1, 2, 16, dropout=0.5)).train()
    expected = torch.stack(list(generate(model, prompts(), 12, temperature=0)))
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(lambda: torch.stack(list(generate(model, prompts(), 12, temperature=0)))) for _ in range(24)
        ]
        assert all(torch.equal(run.result(), expected) for run in runs)
    assert all(module.training for module in model.modules())


def test_any_of_several_stop_tokens_ends_a_row():
    model, tokens = random_model(), prompts(batch=4)
    free = collect(model, tokens, 60, seed=0)
    stops = sorted({row[7] for row in free.tolist()})
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in free.tolist()]
    got = collect(model, tokens, 60, seed=0, stop_token=stops)
    until = min(ends) + 1  # rows draw in turn from one generator
    assert torch.equal(got[:, :until], free[:, :until])
    for row in got.tolist():
        first = next(i for i, token in enumerate(row) if token in stops)
        assert set(row[first:]) == {row[first]}
    assert got.shape[1] == 1 + max(next(i for i, token in enumerate(row) if token in stops) for row in got.tolist())


def test_tokens_are_ordinary_tensors():
    model = random_model()
    step = next(generate(model, prompts(), 1))
    assert not step.is_inference()
    model(step[:, None], step[:, None]).backward()
    assert model.wte.weight.grad is not None


def test_no_tokens_asked_for_gives_none():
    assert list(generate(random_model(), prompts(), 0)) == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -0.1}, ConfigError, "temperature is -0.1, expected a finite number of at least 0"),
        ({"temperature": math.inf}, ConfigError, "temperature is inf"),
        ({"temperature": math.nan}, ConfigError, "temperature is nan"),
        ({"top_k": 0}, ConfigError, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0}, ConfigError, r"top_p is 0.0, expected a number in \(0, 1\]"),
        ({"top_p": 1.1}, ConfigError, "top_p is 1.1"),
        ({"max_new_tokens": -1}, ConfigError, "max_new_tokens is -1"),
        ({"stop_token": 31}, ConfigError, "stop_token is 31, expected an id below the vocabulary of 31"),
        ({"stop_token": [3, -1]}, ConfigError, "stop_token is -1, expected an id below the vocabulary of 31"),
        ({"tokens": torch.zeros(3, 0, dtype=torch.int64)}, ValueError, r"tokens has shape \(3, 0\)"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, ValueError, r"tokens has shape \(3,\)"),
    ],
)
def test_refuses(settings, error, message):
    with pytest.raises(error, match=message):  # at the call, before any step is asked for
        generate(random_model(), **({"tokens": prompts(), "max_new_tokens": 4} | settings))


def test_logits_that_are_not_finite():
    model = random_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="logits are not finite"):
        next(generate(model, prompts(), 4))


def test_cache_refuses():
    with pytest.raises(ValueError, match="max_length is 17, expected 1 to the context of 16"):
        KVCache(CONFIG, 1, max_length=17)
    with pytest.raises(ValueError, match="batch_size is 0"):
        KVCache(CONFIG, 0)
    with pytest.raises(ValueError, match="got a batch of 3, expected 2"):
        random_model()(prompts(), cache=KVCache(CONFIG, 2))
    with pytest.raises(ValueError, match="0 \\+ 5 tokens exceed its max_length of 4"):
        random_model()(prompts(), cache=KVCache(CONFIG, 3, max_length=4))
    cache = KVCache(CONFIG, 3)
    random_model()(prompts(length=12), cache=cache)
    with pytest.raises(ValueError, match="tokens of length 5 after 12 cached does not fit the context of 16"):
        random_model()(prompts(), cache=cache)


# Sampling


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of one row of logits, worked out one id at a time in Python's doubles."""
    weights = [math.exp(value / temperature) for value in logits.double().tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = {}, 0.0
    for i in order:
        kept[i] = weights[i] / total
        mass += kept[i]
        if top_p is not None and mass >= top_p:
            break
    return {i: share / sum(kept.values()) for i, share in kept.items()}


CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.93},
    {"top_p": 1.0},
    {"top_k": 7, "top_p": 0.6},
    {"temperature": 0.3, "top_p": 0.8},
    {"temperature": 2.5, "top_k": 12, "top_p": 0.9},
]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_candidates_equal_a_naive_implementation(cuts):
    logits = 3 * torch.randn(20, 41, generator=torch.Generator().manual_seed(2))
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | cuts
    probabilities, ids = candidates(logits, **settings)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    for row in range(20):
        expected = distribution(logits[row], **settings)
        order = range(41) if ids is None else ids[row].tolist()
        got = {i: p for i, p in zip(order, probabilities[row].tolist(), strict=True) if p}
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_top_p_over_a_large_vocabulary(scale, top_p):
    logits = scale * torch.randn(4, 2500, generator=torch.Generator().manual_seed(6))
    probabilities, ids = candidates(logits, 1.0, None, top_p)
    for row in range(4):
        kept = set(ids[row, probabilities[row] > 0].tolist())
        expected = distribution(logits[row], top_p=top_p)
        # Sums of 2500 fp32 values are good to 2500 * 2^-24 = 1.5e-4; ids at the boundary may differ by it.
        weights = logits[row].double().softmax(-1)
        assert weights[list(kept ^ expected.keys())].sum() < 1.5e-4
        assert weights[list(kept)].sum() > top_p - 1.5e-4


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_frequencies_follow_the_distribution(cuts):
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = distribution(logits, **cuts)
    draws = 20_000
    drawn = sample(logits.expand(draws, 12), generator=torch.Generator().manual_seed(4), **cuts)
    counts = drawn.bincount(minlength=12).tolist()
    assert all(count == 0 for i, count in enumerate(counts) if i not in expected)
    statistic = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    freedom = len(expected) - 1
    # Chi-square has mean n and variance 2 n; the upper tail beyond n + 6 sqrt(2 n) is below 1e-3 for n >= 1.
    assert statistic <= freedom + 6 * (2 * freedom) ** 0.5


def test_rows_are_drawn_independently():
    drawn = sample(torch.zeros(20_000, 4), generator=torch.Generator().manual_seed(0))
    pairs = (4 * drawn[:-1:2] + drawn[1::2]).bincount(minlength=16).double()
    statistic = ((pairs - 625) ** 2 / 625).sum().item()
    assert statistic <= 15 + 6 * 30**0.5


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-30, 1e-4])
def test_temperatures_near_zero_take_the_likeliest(temperature):
    logits = 50 * torch.randn(200, 33, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample(logits, temperature), logits.argmax(-1))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_logits(scale):
    drawn = sample(scale * torch.randn(500, 33, generator=torch.Generator().manual_seed(5)), 1.0, top_p=0.999)
    assert drawn.unique().numel() > 20
