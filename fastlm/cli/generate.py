"""`fastlm generate`: continue a prompt with a trained model, shown as it is sampled."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from tyro.conf import arg

from ..compression import quantization as quantize
from ..compression.quantization import check_scheme
from ..errors import CheckpointError, ConfigError, DataError
from ..inference import generate
from ..inference.sampling import check_sampling

if TYPE_CHECKING:
    from ..data import Tokenizer
    from ..models import GPT, Llama

SEPARATOR = "\n" + "-" * 40 + "\n"


@dataclass
class Options:
    """Continue a prompt with a trained model.

    The prompt and its continuation go to standard output, the rate to standard error. Without --prompt
    and --prompt-file the prompt is read from standard input; at a terminal it is then empty, and an empty
    prompt starts a new document. One newline at the end of a file or of standard input is dropped.
    """

    model: Annotated[str, arg(metavar="RUN_OR_FOLDER")]
    """run folder or checkpoint of `fastlm train`, Hugging Face folder of a GPT-2 or Llama type, or GGUF file"""
    prompt: Annotated[str | None, arg(metavar="TEXT")] = None
    """text to continue"""
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """UTF-8 file with the text to continue"""
    max_new_tokens: int = 256
    """stop after this many tokens, if no end of text comes first"""
    temperature: float = 0.8
    """below 1 sharpens the distribution, 0 always takes the likeliest token"""
    top_k: Annotated[int | None, arg(metavar="K")] = None
    """draw from the k likeliest tokens only"""
    top_p: Annotated[float | None, arg(metavar="P")] = None
    """draw from the likeliest tokens that together reach this probability"""
    seed: Annotated[int | None, arg(metavar="N")] = None
    """the same seed gives the same text"""
    num_samples: int = 1
    """continuations, computed together; the first is shown as it is sampled"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the weights; auto is bfloat16 on a GPU that has it, else float32"""
    weights: Annotated[Literal["bf16", "int8", "int4"] | None, arg(metavar="FORMAT")] = None
    """bf16, int8 or int4: hold the weights in fewer bits, which decodes faster on a CPU"""
    group_size: int = 32
    """weights that share a scale under --weights int4: 32, 64 or 128"""
    stream: bool = True
    """show text as it is sampled, or whole at the end"""


def main(argv: list[str]) -> int | None:
    options = tyro.cli(
        tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Options), prog="fastlm generate", args=argv
    )
    return run(options)


def run(options: Options) -> int:
    """Generate as `options` say.

    Raises:
        ConfigError, DataError, CheckpointError: for a setting out of range, a prompt that cannot be used,
            and a model that cannot be loaded; nothing has been written to standard output then.
    """
    _check(options)
    prompt = _read_prompt(options)
    device = _device(options.device)
    model, tokenizer = load(options.model)
    model = _held(model.eval().to(device, _dtype(options, device)), options)
    ids = _prompt_ids(prompt, tokenizer, model.config.context_length)
    _emit(options, model, tokenizer, prompt, ids)
    return 0


def load(source: str) -> tuple[GPT | Llama, Tokenizer]:
    """Load a model that continues text, and its tokenizer, from whatever `fastlm.load` reads.

    The tokenizer is tokenizer.json in the folder or beside the file, or else what a GGUF file holds of it.

    Raises:
        CheckpointError: if there is nothing at `source`, a model that does not continue text, or one that the
            tokenizer does not fit.
        DataError: for a missing or damaged tokenizer.
    """
    from ..formats import load as loading
    from ..models import GPT, Llama
    from ..training.checkpoint import check_tokenizer, load_checkpoint

    path = loading.resolve(source)
    checkpoint = load_checkpoint(path, model_only=True) if path.suffix == ".safetensors" else None
    model = loading.load(path) if checkpoint is None else loading.restore(checkpoint).eval()
    if not isinstance(model, (GPT, Llama)):
        raise CheckpointError(f"{path}: holds a {type(model).__name__}, expected one that continues text: GPT or Llama")
    tokenizer = _tokenizer(path)
    if checkpoint is not None and checkpoint.tokenizer_fingerprint:  # `fastlm.save` knows of no tokenizer
        check_tokenizer(checkpoint, tokenizer.fingerprint, str(path.parent / "tokenizer.json"))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, "
            f"but the model's vocabulary is {model.config.vocab_size}"
        )
    return model, tokenizer


def _tokenizer(path: Path) -> Tokenizer:
    from ..data import Tokenizer

    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf" and not (folder / "tokenizer.json").is_file():
        from ..formats.gguf.tokenizer import load_tokenizer

        return load_tokenizer(path)
    tokenizer = Tokenizer.load(folder if path.is_dir() else folder / "tokenizer.json")
    if path.is_dir():  # a vocabulary may hold several names for an end; the model was trained to give one
        end = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
        if isinstance(end, int) and 0 <= end < tokenizer.vocab_size:
            tokenizer.eot_id = end
    return tokenizer


def _check(options: Options) -> None:
    check_sampling(options.temperature, options.top_k, options.top_p)
    for name in ("max_new_tokens", "num_samples"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}, expected at least 1")
    check_scheme(options.weights if options.weights == "int4" else "int8", options.group_size)
    if options.weights == "bf16" and options.dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"weights is 'bf16', but dtype is {options.dtype!r}; choose one")
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("prompt and prompt_file are both given; choose one")


def _read_prompt(options: Options) -> str:
    if options.prompt is not None:
        source, data = "prompt", options.prompt.encode("utf-8", "surrogateescape")
    elif options.prompt_file is not None:
        source, data = str(options.prompt_file), options.prompt_file.read_bytes().removesuffix(b"\n")
    elif sys.stdin.isatty():
        return ""
    else:
        source, data = "standard input", sys.stdin.buffer.read().removesuffix(b"\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start}: {error.reason}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's CPU build asserts that it has CUDA
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    """Of the weights, or of what is left in floating point beside quantized ones."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    if options.weights is not None:
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _held(model: GPT | Llama, options: Options) -> GPT | Llama:
    """The model with its weights in the format asked for."""
    if options.weights in ("int8", "int4"):
        quantize(model, options.weights, options.group_size)
    return model


def _prompt_ids(prompt: str, tokenizer: Tokenizer, context_length: int) -> list[int]:
    ids = tokenizer.start_ids + tokenizer.encode(prompt)
    if not ids:
        if tokenizer.eot_id is None:
            raise ConfigError("the prompt is empty, and this tokenizer has no end-of-text token to start from")
        return [tokenizer.eot_id]
    if len(ids) > context_length:
        print(
            f"the prompt has {len(ids)} tokens, the model's context holds {context_length}: "
            f"only the last {context_length} are read",
            file=sys.stderr,
        )
    return ids[-context_length:]


class _Text:
    """One sample's text, in whole characters; the prompt's ids go in first: spacing may hang on them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]):
        self.stop, self.vocab_size, self.stream = tokenizer.eot_id, tokenizer.vocab_size, tokenizer.stream()
        for token in prompt_ids:
            self.stream.push(token)
        self.tokens, self.finished = 0, False

    def push(self, token: int) -> str:
        if self.finished:
            return ""
        self.tokens += 1
        self.finished = token == self.stop
        if self.finished:
            return self.stream.flush()
        # A model's vocabulary may be padded to a round size; such an id stands for no text.
        return self.stream.push(token) if token < self.vocab_size else "\ufffd"

    def flush(self) -> str:
        return "" if self.finished else self.stream.flush()


def _emit(options: Options, model: GPT | Llama, tokenizer: Tokenizer, prompt: str, ids: list[int]) -> None:
    """Generate and print; the first sample goes out piece by piece, the others when all are done."""
    texts = [_Text(tokenizer, ids) for _ in range(options.num_samples)]
    pieces: list[list[str]] = [[prompt] for _ in texts]
    steps = generate(
        model,
        torch.tensor([ids] * len(texts)),
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_token=tokenizer.eot_id,
    )
    start = time.perf_counter()
    for new in steps:
        for text, parts, token in zip(texts, pieces, new.tolist(), strict=True):
            parts.append(text.push(token))
        if options.stream:
            _write("".join(pieces[0]))
            pieces[0].clear()
    seconds = time.perf_counter() - start
    for text, parts in zip(texts, pieces, strict=True):
        parts.append(text.flush())
    _write(SEPARATOR.join("".join(parts) for parts in pieces) + "\n")
    tokens = sum(text.tokens for text in texts)
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def _write(text: str) -> None:
    if text:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
