"""`fastlm demo`: a real corpus, a tokenizer, a GPT trained on it, and text that it writes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastlm

from .._core.architecture import architecture
from .._core.files import replace_text
from ..data import PrepareConfig, Tokenizer, load_manifest, prepare
from ..data.corpora import demo_corpus
from ..errors import ConfigError, shown
from ..formats.load import load_with_tokenizer
from ..inference import generate
from ..models import CausalLM
from ..runtime import DTYPES, choose_device, keep_freed_memory, refuse_ranks
from ..training import TrainConfig, TrainResult, train
from ..training.lock import run_lock
from ..training.progress import ConsoleReporter, Reporter
from .flags import parse
from .train import describe, resume_command

PRODUCTS = ("loss.png", "metrics.jsonl", "sample.txt", "summary.json")


@dataclass
class Arguments:
    """Train a small GPT on Shakespeare in a few minutes and let it write.

    A rerun starts afresh in the same folder; the corpus that was fetched before is used again.
    """

    out: Path = Path("runs/demo")  # folder for everything the demo makes
    minutes: float = 4.0  # the most that training may take
    steps: int = 1500  # training ends here where the machine is fast enough
    sample_tokens: int = 300  # tokens to write at the end
    prompt: str = "\n"  # what the sample continues
    seed: int = 1337  # decides weights, data order and sample
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0, or 130 after Ctrl-C in training, when the run was saved."""
    arguments = parse(Arguments, "fastlm demo", argv)
    config = train_config(arguments)
    refuse_ranks()
    choose_device(config.device)
    reporter = ConsoleReporter()
    keep_freed_memory()
    with run_lock(arguments.out):  # another's data are not cleared
        clear(arguments.out)
        corpus = prepare_corpus(arguments.out, reporter)
    result = train(config, overwrite=True, reporter=reporter)
    reporter.message(describe(result))
    if result.interrupted:
        reporter.message(f"to continue: {resume_command(config)}")
        return 130
    model, tokenizer = load_with_tokenizer(arguments.out, device=result.device)
    assert isinstance(model, CausalLM)
    sample = write_sample(model, tokenizer, arguments, reporter)
    replace_text(arguments.out / "sample.txt", sample)
    summary = summarize(corpus, config, result)
    replace_text(arguments.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    reporter.message(f"{summary['bits_per_char']:.3f} bits per character on held-out text of {corpus}")
    reporter.message(f"{', '.join(PRODUCTS)} are in {arguments.out}")
    return 0


def train_config(arguments: Arguments) -> TrainConfig:
    """Settings found by short runs on the complete Shakespeare with two CPU cores.

    Raises:
        ConfigError: naming the argument that is out of range.
    """
    if not 0 < arguments.minutes < math.inf:
        raise ConfigError(f"minutes is {arguments.minutes}, expected more than 0")
    for name, least in (("steps", 1), ("sample_tokens", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"{name} is {getattr(arguments, name)}, expected at least {least}")
    if arguments.steps >= 2**63:  # named here as the flag of this verb
        raise ConfigError(f"steps is {shown(arguments.steps)}, expected an integer of 64 bits")
    return TrainConfig(
        data=str(arguments.out / "data"),
        out=str(arguments.out),
        seed=arguments.seed,
        device=arguments.device,
        n_layer=4,
        n_head=4,
        n_embd=256,
        context_length=128,
        batch_size=16,
        learning_rate=2e-3,
        min_lr_ratio=0.05,
        warmup_steps=50,
        max_steps=arguments.steps,
        max_minutes=arguments.minutes,
        eval_interval=300,
        eval_tokens=0,
    )


def clear(out: Path) -> None:
    """Remove what an earlier demo left, so that nothing old passes for new; the fetched corpus stays."""
    for name in PRODUCTS:
        (out / name).unlink(missing_ok=True)
    if (out / "data" / "manifest.json").is_file():
        shutil.rmtree(out / "data")


def prepare_corpus(out: Path, reporter: Reporter) -> str:
    """Fetch the corpus and turn it into tokens in `out/data`; its name."""
    name, paths = demo_corpus(out / "corpus")
    reporter.message(f"corpus: {name}, {sum(path.stat().st_size for path in paths):,} bytes")
    # 2048 tokens: short enough words to learn in minutes, long enough that a context holds several lines.
    settings = PrepareConfig(inputs=tuple(paths), out=out / "data", tokenizer="bpe", vocab_size=2048)
    splits = prepare(settings).splits
    reporter.message(f"tokens: {splits['train']['tokens']:,} to train on, {splits['val']['tokens']:,} held out")
    return name


def write_sample(model: CausalLM, tokenizer: Tokenizer, arguments: Arguments, reporter: Reporter) -> str:
    """Text that the model continues the prompt with; the prompt is part of it."""
    ids = torch.tensor([tokenizer.encode(arguments.prompt)], device=next(model.parameters()).device)
    steps = generate(
        model,
        ids,
        arguments.sample_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=arguments.seed,
        stop_token=tokenizer.eot_id,
    )
    new = [int(step) for step in steps]
    if new and new[-1] == tokenizer.eot_id:
        new.pop()
    text = arguments.prompt + tokenizer.decode(new) + "\n"
    reporter.message(text)
    return text


def summarize(corpus: str, config: TrainConfig, result: TrainResult) -> dict[str, Any]:
    """What the demo measured.

    `bits_per_char` is that of the best checkpoint on the whole held-out split, `train_seconds` the wall time
    of training with its evaluations, `tokens_per_second` the pace of the training steps alone.
    """
    backend, isa = attention_backend(config, result)
    split = load_manifest(config.data).splits["val"]
    assert result.best_loss is not None  # a finished run has evaluated
    return {
        "corpus": corpus,
        "bits_per_char": result.best_loss * split["tokens"] / split["chars"] / math.log(2),
        "train_seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "backend": backend,
        "isa": isa,
        "parameters": result.parameters,
        "steps": result.step,
        "device": result.device,
        "dtype": result.dtype,
    }


def attention_backend(config: TrainConfig, result: TrainResult) -> tuple[str | None, str | None]:
    """The backend that served the model's attention, and the instruction set that it is for."""
    shape = (1, config.n_head, config.context_length, config.n_embd // config.n_head)
    q = torch.empty(shape, device=result.device, dtype=DTYPES[result.dtype])
    backend = fastlm.explain(fastlm.scaled_dot_product_attention, q, q, q, is_causal=True).selected
    if q.is_cuda:
        return backend, str(architecture(q.device.index))
    return backend, fastlm.cpu_isa()
