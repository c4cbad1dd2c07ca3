"""`fastlm generate`: shows what the model draws, in whole characters, and refuses bad input in one line."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.cli import main
from fastlm.inference import generate
from fastlm.models import BERT, GPT, BERTConfig, GPTConfig, Llama, LlamaConfig, Seq2Seq, Seq2SeqConfig

tokenizers = pytest.importorskip("tokenizers")
data = pytest.importorskip("fastlm.data")


def random_model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


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
    assert writes == ["a!é", *"世🙂!é世🙂!é世", "\ufffd\n"]
    assert re.fullmatch(r"26 tokens in [\d.]+ s, [\d.]+ tokens/s\n", capsys.readouterr().err)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_shorter_weights_tell_the_same_clear_story(bytes_tokenizer, monkeypatch, weights):
    """The likeliest token of this model is far ahead of the others, so that rounding its weights changes nothing."""
    raw, path = bytes_tokenizer
    successor_model(raw, "abcdef").save_huggingface(path)
    args = (path, "--prompt", "ab", "--temperature", 0, "--max-new-tokens", 30)
    expected = run(monkeypatch, *args)
    status, writes = run(monkeypatch, *args, "--weights", weights)
    assert status == 0
    assert "".join(writes) == "".join(expected[1]) == "ab" + "cdefab" * 5 + "\n"


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


def test_run_folder_and_checkpoint_give_what_their_model_gives(bytes_tokenizer, monkeypatch, tmp_path):
    checkpoint = pytest.importorskip("fastlm.formats.checkpoint")
    _, exported = bytes_tokenizer
    model = random_model(GPTConfig(257, 32, 2, 2, 16))
    model.save_huggingface(exported)
    tokenizer = data.Tokenizer.load(exported)
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    last = tmp_path / "run" / "last.safetensors"
    checkpoint.save_checkpoint(last, model, tokenizer_fingerprint=tokenizer.fingerprint)
    args = ("--prompt", "the ", "--temperature", 0, "--max-new-tokens", 20)
    expected = run(monkeypatch, exported, *args)
    assert expected[0] == 0
    assert run(monkeypatch, tmp_path / "run", *args) == expected
    assert run(monkeypatch, last, *args) == expected


def random_llama(vocab_size: int = 257) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size, 32, 2, 4, 16, 24, n_kv_head=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("format", ["hf", "fastlm"])
def test_a_llama_continues_after_what_its_tokenizer_puts_first(format, bytes_tokenizer, monkeypatch):
    raw, path = bytes_tokenizer
    start = raw.token_to_id("<|endoftext|>")
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    raw.save(str(path / "tokenizer.json"))
    model = random_llama()
    fastlm.save(model, path, format=format)
    prompt = torch.tensor([[start, *raw.encode("the ", add_special_tokens=False).ids]])
    steps = generate(model, prompt, 9, temperature=0, stop_token=start)
    expected = raw.decode(torch.stack(list(steps), 1)[0].tolist())
    args = ("--prompt", "the ", "--temperature", 0, "--max-new-tokens", 9)
    status, writes = run(monkeypatch, path, *args)
    assert (status, "".join(writes)) == (0, f"the {expected}\n")


@pytest.mark.parametrize(
    "model",
    [BERT(BERTConfig(257, 24, 1, 2, 16)), Seq2Seq(Seq2SeqConfig(257, 24, 1, 1, 2, 16, output_bias=True))],
    ids=["BERT", "Seq2Seq"],
)
@pytest.mark.parametrize("format", ["hf", "fastlm"])
def test_refuses_models_that_do_not_continue_text(model, format, bytes_tokenizer, monkeypatch, capsys):
    _, path = bytes_tokenizer
    fastlm.save(model, path, format=format)
    assert run(monkeypatch, path, "--prompt", "a") == (1, [])
    error = capsys.readouterr().err
    assert f"holds a {type(model).__name__}, expected one that continues text: GPT or Llama" in error
    assert error.count("\n") == 1


def test_a_folder_says_which_token_ends_a_text(bytes_tokenizer, monkeypatch, capsys):
    raw, path = bytes_tokenizer
    (end,) = byte_ids(raw, "d")
    successor_model(raw, "abcdef").save_huggingface(path, eot_id=end)
    assert "".join(run(monkeypatch, path, "--prompt", "a", "--temperature", 0)[1]) == "abc\n"
    assert capsys.readouterr().err.startswith("3 tokens in")


def write_generation_config(path, **settings):
    (path / "generation_config.json").write_text(json.dumps(settings))


def test_any_of_several_ends_of_a_folder_ends_a_text(bytes_tokenizer, monkeypatch, capsys):
    raw, path = bytes_tokenizer
    ends = [byte_ids(raw, letter)[0] for letter in "ec"]
    successor_model(raw, "abcdef").save_huggingface(path)
    write_generation_config(path, eos_token_id=[raw.token_to_id("<|endoftext|>"), *ends])
    assert "".join(run(monkeypatch, path, "--prompt", "a", "--temperature", 0)[1]) == "ab\n"
    assert capsys.readouterr().err.startswith("2 tokens in")
    assert "".join(run(monkeypatch, path, "--prompt", "d", "--temperature", 0)[1]) == "d\n"
    fastlm.save(fastlm.load(path), path)
    assert "".join(run(monkeypatch, path, "--prompt", "a", "--temperature", 0)[1]) == "ab\n"
    config = json.loads((path / "config.json").read_text())
    (path / "generation_config.json").unlink()
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    assert "".join(run(monkeypatch, path, "--prompt", "a", "--temperature", 0)[1]) == "ab\n"


def test_the_ends_of_a_checkpoint_of_a_loaded_model_are_kept(bytes_tokenizer, monkeypatch):
    raw, path = bytes_tokenizer
    successor_model(raw, "abcdef").save_huggingface(path)
    write_generation_config(path, eos_token_id=byte_ids(raw, "d") + byte_ids(raw, "e"))
    model = fastlm.load(path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (path / name).unlink()
    fastlm.save(model, path, format="fastlm")
    assert "".join(run(monkeypatch, path, "--prompt", "a", "--temperature", 0)[1]) == "abc\n"


def test_the_tokenizers_own_end_counts_where_no_config_names_one(bytes_tokenizer, monkeypatch):
    raw, path = bytes_tokenizer
    raw.add_special_tokens(["<|im_end|>"])
    raw.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    torch.manual_seed(0)
    model = GPT(GPTConfig(258, 64, 1, 1, 64, tie_embeddings=False))
    with torch.no_grad():  # draws the last id always
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[257] = 10.0
    model.save_huggingface(path)
    assert "".join(run(monkeypatch, path, "--prompt", "a", "--temperature", 0)[1]) == "a\n"


def test_the_folder_decides_where_no_flag_does(bytes_tokenizer, monkeypatch, capsys):
    raw, path = bytes_tokenizer
    successor_model(raw, "abcdef").save_huggingface(path)
    write_generation_config(path, do_sample=False, max_length=9, suppress_tokens=byte_ids(raw, "z"), num_beams=3)
    assert "".join(run(monkeypatch, path, "--prompt", "ab")[1]) == "abcdefabc\n"  # the likeliest, to a length of 9
    error = capsys.readouterr().err.splitlines()
    assert error[0].endswith("generation_config.json says num_beams 3: not followed here")
    assert "".join(run(monkeypatch, path, "--prompt", "ab", "--max-new-tokens", 3)[1]) == "abcde\n"
    write_generation_config(path, do_sample=True, temperature=1e-4, max_new_tokens=2)
    assert "".join(run(monkeypatch, path, "--prompt", "ab")[1]) == "abcd\n"
    hot = run(monkeypatch, path, "--prompt", "ab", "--temperature", 100, "--max-new-tokens", 30, "--seed", 0)[1]
    assert "".join(hot) != "ab" + "cdefab" * 5 + "\n"
    write_generation_config(path, do_sample=False, forced_eos_token_id=byte_ids(raw, "x")[0], max_new_tokens=4)
    assert "".join(run(monkeypatch, path, "--prompt", "ab")[1]) == "abcdex\n"


def test_a_prompt_may_be_the_word_none(bytes_tokenizer, monkeypatch, tmp_path):
    raw, path = bytes_tokenizer
    successor_model(raw, "Noneabc").save_huggingface(path)
    args = (path, "--temperature", 0, "--max-new-tokens", 3)
    assert "".join(run(monkeypatch, *args, "--prompt", "None", stdin=b"ab")[1]) == "Noneabc\n"
    monkeypatch.chdir(tmp_path)
    Path("None").write_text("on")
    assert "".join(run(monkeypatch, *args, "--prompt-file", "None", stdin=b"ab")[1]) == "oneab\n"


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
        (["--top-p", "0"], "--top-p is 0.0, expected a number in (0, 1]"),
        (["--top-p", "1.5"], "--top-p is 1.5, expected a number in (0, 1]"),
        (["--top-k", "0"], "--top-k is 0, expected at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["--num-samples", "0"], "--num-samples is 0, expected at least 1"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file are both given; choose one"),
        (["--prompt-file", "not/there.txt"], "No such file or directory: 'not/there.txt'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--num-samples", str(10**12)], "--num-samples is 1000000000000: their logits need"),
        (["--weights", "int4", "--group-size", "48"], "--group-size is 48, expected one of (32, 64, 128)"),
        (["--weights", "bf16", "--dtype", "float32"], "--weights is 'bf16', but --dtype is 'float32'; choose one"),
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


def test_ids_that_only_pad_the_vocabulary_show_as_unknown(bytes_tokenizer, monkeypatch):
    _, path = bytes_tokenizer
    model = random_model(GPTConfig(300, 32, 1, 1, 16, tie_embeddings=False))
    with torch.no_grad():  # a head that is large along the final bias draws id 290 always
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[290] = 10.0
    model.save_huggingface(path)
    status, writes = run(monkeypatch, path, "--prompt", "a", "--max-new-tokens", 3)
    assert status == 0
    assert "".join(writes) == "a\ufffd\ufffd\ufffd\n"


def test_an_empty_prompt_needs_an_end_of_text_token(tmp_path, monkeypatch, capsys):
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    raw.save(str(tmp_path / "tokenizer.json"))
    random_model(GPTConfig(2, 8, 1, 1, 8)).save_huggingface(tmp_path)
    assert run(monkeypatch, tmp_path, stdin=b"") == (1, [])
    assert "the prompt is empty, and this tokenizer has no end-of-text token" in capsys.readouterr().err
