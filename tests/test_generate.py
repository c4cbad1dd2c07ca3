"""Generation: the cache changes nothing, draws follow the distribution, the command shows what was drawn."""

import io
import math
import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from fastlm.cli import main
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
    expected = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=27, do_sample=False, pad_token_id=0
    )
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
    stop = next(
        t for t in range(31) if (free == t).any(1).all() and len({row.index(t) for row in free.tolist()}) > 1
    )
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
    with pytest.raises(ValueError, match="5 tokens after 12 cached is longer than the context of 16"):
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


# The command


class Recorder(io.TextIOWrapper):
    """A standard output that remembers each write on its own."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding)
        self.writes = []

    def write(self, text):
        self.writes.append(text.encode(self.encoding).decode(self.encoding))
        return len(text)


TEXT = "the cat sat on the mat, and the dog sat on the cat. é世🙂\n" * 8


@pytest.fixture
def bytes_tokenizer(tmp_path):
    """A byte-level BPE without merges: an id a byte, then end of text."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "model"
    path.mkdir()
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([], trainer)
    raw.save(str(path / "tokenizer.json"))
    return raw, path


def byte_ids(raw, text):
    return raw.encode(text).ids


def successor_model(raw, cycle: str, end: bool = False) -> GPT:
    """A model whose likeliest next token follows a cycle through the bytes of `cycle`.

    The blocks add nothing and positions are zero, so the hidden state is the normed embedding of the
    current token, and the head's row of the successor points along it.
    """
    ids = byte_ids(raw, cycle)
    assert len(set(ids)) == len(ids)
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 64, 1, 1, 64, tie_embeddings=False))
    successors = [*ids[1:], raw.token_to_id("<|endoftext|>") if end else ids[0]]
    with torch.no_grad():
        for parameter in (*model.h[0].attn.c_proj.parameters(), *model.h[0].mlp.c_proj.parameters()):
            parameter.zero_()
        model.wpe.weight.zero_()
        model.wte.weight.copy_(torch.randn(257, 64))
        model.lm_head.weight.zero_()
        normed = torch.nn.functional.layer_norm(model.wte.weight, (64,))
        model.lm_head.weight[successors] = normed[ids]
    return model


@pytest.fixture
def model_folder(bytes_tokenizer):
    _, path = bytes_tokenizer
    random_model(GPTConfig(257, 32, 2, 2, 16)).save_huggingface(path)
    return path


def run(monkeypatch, *args, stdin: bytes | None = b"", encoding="utf-8"):
    """Run `fastlm generate` in this process; return its status and the pieces it wrote."""
    out = Recorder(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
    status = main(["generate", "--device", "cpu", *map(str, args)])
    return status, out.writes


def test_streams_whole_characters_as_they_are_sampled(bytes_tokenizer, monkeypatch, capsys):
    raw, path = bytes_tokenizer
    successor_model(raw, "é世🙂!").save_huggingface(path)
    # 2 + 3 + 4 + 1 bytes a cycle; the last token asked for is the third of a four-byte character.
    status, writes = run(monkeypatch, path, "--prompt", "a!é", "--max-new-tokens", 26, "--temperature", 0)
    assert status == 0
    assert writes == ["a!é", *"世🙂!é世🙂!é世", "\ufffd\n"] or writes == ["a!é", *"世🙂!é世🙂!é世", "\n"]
    assert re.fullmatch(r"26 tokens in [\d.]+ s, [\d.]+ tokens/s\n", capsys.readouterr().err)


def test_stops_at_the_end_of_text(bytes_tokenizer, monkeypatch, capsys):
    raw, path = bytes_tokenizer
    successor_model(raw, "abcdef", end=True).save_huggingface(path)
    status, writes = run(monkeypatch, path, "--prompt", "ab", "--temperature", 0, "--num-samples", 2)
    assert status == 0
    first, second = "".join(writes).split("\n" + "-" * 40 + "\n")
    assert (first, second) == ("abcdef", "abcdef\n")
    assert capsys.readouterr().err.startswith("10 tokens in")  # cdef and end of text, twice


def test_whole_output_equals_streamed_output_and_the_seed_repeats_it(model_folder, monkeypatch):
    args = (
        model_folder,
        "--prompt",
        "the ",
        "--seed",
        3,
        "--max-new-tokens",
        50,
        "--num-samples",
        3,
        "--top-k",
        90,
    )
    streamed, whole = run(monkeypatch, *args)[1], run(monkeypatch, *args, "--no-stream")[1]
    assert len(whole) == 1
    assert len(streamed) > 3
    assert "".join(streamed) == whole[0]
    assert "".join(run(monkeypatch, *args[:4], 4, *args[5:])[1]) != whole[0]


def test_prompt_comes_from_argument_file_or_standard_input(model_folder, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("té\n".encode())
    common = (model_folder, "--temperature", 0, "--max-new-tokens", 5)
    outputs = [
        "".join(run(monkeypatch, *common, "--prompt", "té")[1]),
        "".join(run(monkeypatch, *common, "--prompt-file", tmp_path / "prompt.txt")[1]),
        "".join(run(monkeypatch, *common, stdin="té\n".encode())[1]),
    ]
    assert outputs[0].startswith("té")
    assert outputs[1:] == outputs[:1] * 2


def test_an_empty_prompt_starts_a_document(bytes_tokenizer, model_folder, monkeypatch):
    raw, path = bytes_tokenizer
    model = GPT.from_huggingface(path)
    start = torch.tensor([[raw.token_to_id("<|endoftext|>")]])
    steps = generate(model, start, 9, temperature=0, stop_token=start.item())
    expected = raw.decode(torch.stack(list(steps), 1)[0].tolist())
    status, writes = run(monkeypatch, path, "--prompt", "", "--temperature", 0, "--max-new-tokens", 9)
    assert status == 0
    assert "".join(writes) == expected + "\n"


def test_a_long_prompt_keeps_its_last_part(model_folder, monkeypatch, capsys):
    common = (model_folder, "--temperature", 0, "--max-new-tokens", 12)
    status, writes = run(monkeypatch, *common, "--prompt", "x" * 50 + TEXT[:32])
    assert status == 0
    error = capsys.readouterr().err
    assert "the prompt has 82 tokens, the model's context holds 32: only the last 32 are read" in error
    short = "".join(run(monkeypatch, *common, "--prompt", TEXT[:32])[1])
    assert "".join(writes) == "x" * 50 + short


def test_output_that_cannot_show_a_character_replaces_it(bytes_tokenizer, monkeypatch):
    raw, path = bytes_tokenizer
    successor_model(raw, "é世🙂!").save_huggingface(path)
    args = (path, "--prompt", "!", "--max-new-tokens", 10, "--temperature", 0)
    status, writes = run(monkeypatch, *args, encoding="latin-1")
    assert status == 0
    assert "".join(writes) == "!é??!\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0, expected a finite number of at least 0"),
        (["--top-p", "0"], "top_p is 0.0, expected a number in (0, 1]"),
        (["--top-p", "1.5"], "top_p is 1.5, expected a number in (0, 1]"),
        (["--top-k", "0"], "top_k is 0, expected at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0, expected at least 1"),
        (["--num-samples", "0"], "num_samples is 0, expected at least 1"),
        (["--prompt", "a", "--prompt-file", "b"], "prompt and prompt_file are both given; choose one"),
        (["--prompt-file", "not/there.txt"], "No such file or directory: 'not/there.txt'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_refuses_arguments_in_one_line(model_folder, monkeypatch, capsys, args, message):
    status, writes = run(monkeypatch, model_folder, *args)
    error = capsys.readouterr().err
    assert (status, writes) == (1, [])
    assert message in error
    assert error.startswith("fastlm generate: ")
    assert error.count("\n") == 1


def test_refuses_text_that_is_not_utf8(model_folder, monkeypatch, capsys):
    assert run(monkeypatch, model_folder, stdin=b"caf\xe9 noir")[0] == 1
    assert "standard input: not UTF-8 at byte 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_refuses_a_folder_that_lacks_a_file(model_folder, monkeypatch, capsys, name):
    (model_folder / name).unlink()
    assert run(monkeypatch, model_folder, "--prompt", "a") == (1, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(model_folder) in error


def test_refuses_a_path_with_nothing_there(monkeypatch, capsys):
    assert run(monkeypatch, "no/such/run", "--prompt", "a") == (1, [])
    assert "no/such/run: no such file or folder" in capsys.readouterr().err


def test_refuses_a_tokenizer_of_another_model(bytes_tokenizer, monkeypatch, capsys):
    _, path = bytes_tokenizer
    random_model(GPTConfig(200, 32, 1, 1, 8)).save_huggingface(path)
    assert run(monkeypatch, path, "--prompt", "a") == (1, [])
    assert "the tokenizer has 257 ids, but the model's vocabulary is 200" in capsys.readouterr().err


def test_an_empty_prompt_needs_an_end_of_text_token(tmp_path, monkeypatch, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    raw.save(str(tmp_path / "tokenizer.json"))
    random_model(GPTConfig(2, 8, 1, 1, 8)).save_huggingface(tmp_path)
    assert run(monkeypatch, tmp_path, stdin=b"") == (1, [])
    assert "the prompt is empty, and this tokenizer has no end-of-text token" in capsys.readouterr().err
