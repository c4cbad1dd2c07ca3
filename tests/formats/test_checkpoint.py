"""Checkpoints: exact, whole or not at all, and clear about what is wrong with a file."""

import json
import math
import random
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastlm
from fastlm._core.tensor_writer import NAMES, damage, write_tensors
from fastlm.data import Tokenizer
from fastlm.errors import CheckpointError, DataError
from fastlm.formats.checkpoint import (
    load_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
)
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.training import TrainConfig, rng
from fastlm.training.optimizer import build_optimizer
from fastlm.training.state import State

SIZES = {"vocab_size": 31, "context_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}


def make(seed=0, **sizes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SIZES, **sizes}))


def trained(seed=0, **sizes):
    """A model and an optimizer that has taken two steps."""
    model = make(seed, **sizes)
    optimizer = build_optimizer(model, TrainConfig())
    for _ in range(2):
        x = torch.randint(model.config.vocab_size, (2, 8))
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip_is_exact(tmp_path, tie):
    model, optimizer = trained(tie_embeddings=tie)
    path = tmp_path / "last.safetensors"
    save_checkpoint(
        path,
        model,
        optimizer,
        step=2,
        train_config={"seed": 3},
        tokenizer_fingerprint="abc",
        state={"best_loss": 0.1 + 0.2},
    )
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, checkpoint.tokenizer_fingerprint) == (2, "abc")
    assert checkpoint.model_config == model.config.to_dict()
    assert checkpoint.train_config == {"seed": 3}
    assert checkpoint.state == {"best_loss": 0.1 + 0.2}

    other, other_optimizer = trained(seed=1, tie_embeddings=tie)
    restore_model(checkpoint, other)
    restore_optimizer(checkpoint, other, other_optimizer)
    assert_same_tensors(other.state_dict(), model.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_tensors(optimizer.state[p], other_optimizer.state[q])


def test_generators_continue_where_they_were():
    rng.seed_all(5)
    random.gauss(0, 1)  # leaves a second Gaussian kept back in Python's and NumPy's generators
    np.random.standard_normal()
    states = rng.capture()

    def draw():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        )

    first = draw()
    rng.restore(states)
    assert draw() == first


def test_a_missing_generator_is_named():
    states = rng.capture()
    del states["numpy"]
    with pytest.raises(CheckpointError, match="lacks the state of the random generator numpy"):
        rng.restore(states)


def test_any_tensor_is_read_back_by_the_formats_own_library(tmp_path):
    """Every dtype; no dimensions, none of an extent, other strides; the data aligned to each tensor's own size."""
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (5, 3)).to(dtype) for dtype in NAMES}
    tensors |= {"scalar": torch.tensor(0.25), "empty": torch.empty(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}
    tensors |= {"transposed": torch.randn(3, 4).T, "strided": torch.randn(20)[::3], "same": tensors["scalar"]}
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensors, {"a": "ü\n"}, checksums=True)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), file.keys()
    assert metadata["a"] == "ü\n"
    assert damage(metadata, names, read) == ""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    entries = json.loads(content[8:start])
    for name, tensor in tensors.items():
        assert entries[name]["data_offsets"][0] % tensor.element_size() == 0


@pytest.mark.parametrize(
    "checksums", ["", "3", "null", "[" * 10_000, "{}", '{"algorithm": "crc0", "metadata": "", "tensors": {}}']
)
def test_checksums_that_are_none_are_damage(checksums):
    assert "its checksums are" in damage({"checksums": checksums}, [], {})


def test_tied_weights_are_stored_once(tmp_path):
    model = make()
    save_checkpoint(tmp_path / "c.safetensors", model)
    stored = sum(t.numel() for t in load_file(tmp_path / "c.safetensors").values())
    assert stored == model.num_parameters()


def test_header_names_tensors_and_settings_by_prefix(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, step=2, rng=rng.capture())
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"model", "optimizer", "rng"}  # noqa: SIM118
        assert json.loads(file.metadata()["model_config"])["n_embd"] == 16


def test_new_file_has_the_users_permissions(tmp_path):
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "c.safetensors", make())
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, make(seed=1), step=7)
    before = path.read_bytes()
    # A child process may write 10 kB to a file, less than the checkpoint needs: as on a full disk, the
    # write fails half way.
    script = textwrap.dedent(f"""
        import resource, sys
        import torch
        from fastlm.errors import CheckpointError
        from fastlm.models.gpt import GPT, GPTConfig
        from fastlm.formats.checkpoint import save_checkpoint
        model = GPT(GPTConfig(**{SIZES!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))
        try:
            save_checkpoint({str(path)!r}, model, step=8)
        except CheckpointError as error:
            sys.exit(str(error))
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert "could not write" in run.stderr
    assert str(path) in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]
    assert path.read_bytes() == before


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/c.safetensors: could not write \d+ bytes"):
        save_checkpoint(tmp_path / "nowhere" / "c.safetensors", make())


def test_every_cut_is_refused_with_sizes(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_checkpoint(whole, make())
    data = whole.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"cut.safetensors: .*\b{size} bytes") as caught:
            load_checkpoint(cut)
        assert "\n" not in str(caught.value)
    assert str(len(data)) in str(caught.value)


@pytest.mark.parametrize("data", [b"PK\x03\x04 a zip archive" * 9, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "c.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: "):
        load_checkpoint(path)


def test_safetensors_of_another_program_is_refused(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "c.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"format is 'pt', expected 'fastlm\.checkpoint/1'"):
        load_checkpoint(tmp_path / "c.safetensors")


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"last\.safetensors: no such checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_embd": 32}, r"model\.wte\.weight has shape \(31, 16\), the model has \(31, 32\)"),
        ({"n_layer": 3}, r"lacks h\.2\.\S+, \S+, \S+ and \d+ more of the model's tensors"),
        ({"n_layer": 1}, r"holds h\.1\.\S+, \S+, \S+ and \d+ more, which the model has not"),
    ],
)
def test_another_model_is_refused_and_stays_unchanged(tmp_path, sizes, message):
    save_checkpoint(tmp_path / "c.safetensors", make())
    other = make(**sizes)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        restore_model(load_checkpoint(tmp_path / "c.safetensors"), other)
    assert_same_tensors(other.state_dict(), before)


@pytest.mark.parametrize("value", [math.nan, -(2.0**64), 2.0**63, math.inf])
@pytest.mark.parametrize("name", ["seconds", "best", "loss_sum"])
def test_a_state_that_no_run_leaves_is_refused(name, value):
    with pytest.raises(CheckpointError, match=f"c: state.{name} is not a possible float"):
        State.from_dict({name: value}, "c")


def test_times_are_not_negative_but_losses_may_be():
    with pytest.raises(CheckpointError, match=r"c: state\.seconds is not a possible float"):
        State.from_dict({"seconds": -1.0}, "c")
    assert State.from_dict({"best": -1.0, "loss_sum": -2.0}, "c") == State(best=-1.0, loss_sum=-2.0)


def test_the_best_loss_of_earlier_versions_is_read():
    assert State.from_dict({"step": 4, "best_loss": 1.5}, "c") == State(step=4, best=1.5)


def test_a_checkpoint_for_inference_cannot_be_resumed_from(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "best.safetensors", model)
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        restore_optimizer(load_checkpoint(tmp_path / "best.safetensors"), model, optimizer)


def test_optimizer_state_of_another_shape_is_refused(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer)
    checkpoint = load_checkpoint(tmp_path / "c.safetensors")
    checkpoint.tensors["optimizer.wte.weight.exp_avg"] = torch.zeros(2)
    message = r"optimizer\.wte\.weight\.exp_avg is of shape \(2,\), expected \(31, 16\)"
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer(checkpoint, model, optimizer)


class TestLoadModel:
    @pytest.fixture
    def run(self, tmp_path):
        tokenizer = Tokenizer.characters("abcdefgh \n")
        tokenizer.save(tmp_path / "tokenizer.json")
        model = make(vocab_size=tokenizer.vocab_size)
        save_checkpoint(tmp_path / "last.safetensors", model, tokenizer_fingerprint=tokenizer.fingerprint)
        return tmp_path, model, tokenizer

    def test_same_logits_and_tokenizer(self, run):
        folder, model, tokenizer = run
        loaded, loaded_tokenizer = fastlm.load_with_tokenizer(folder)
        x = torch.tensor([tokenizer.encode("a bad cab")[:8]])
        assert torch.equal(loaded(x), model.eval()(x))
        assert not loaded.training
        assert loaded_tokenizer.fingerprint == tokenizer.fingerprint

    def test_folder_stands_for_the_best_checkpoint(self, run):
        folder, _, tokenizer = run
        best = make(seed=9, vocab_size=tokenizer.vocab_size)
        save_checkpoint(folder / "best.safetensors", best, tokenizer_fingerprint=tokenizer.fingerprint)
        assert torch.equal(fastlm.load_with_tokenizer(folder)[0].wte.weight, best.wte.weight)
        assert not torch.equal(fastlm.load_with_tokenizer(folder / "last.safetensors")[0].wte.weight, best.wte.weight)

    def test_another_tokenizer_is_refused(self, run):
        folder, _, tokenizer = run
        other = Tokenizer.characters("xyz")
        other.save(folder / "tokenizer.json")
        with pytest.raises(CheckpointError) as caught:
            fastlm.load_with_tokenizer(folder)
        assert tokenizer.fingerprint[:12] in str(caught.value)
        assert other.fingerprint[:12] in str(caught.value)

    def test_missing_tokenizer(self, run):
        (run[0] / "tokenizer.json").unlink()
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            fastlm.load_with_tokenizer(run[0])
