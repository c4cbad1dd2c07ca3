"""`fastlm generate`: continue a prompt with a trained model, shown as it is sampled."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import arg

from ..compression.quantization import check_scheme, quantize, quantized_layers
from ..errors import CheckpointError, ConfigError, DataError, shown
from ..inference import generate
from ..inference.sampling import check_sampling
from ..models.common.generation import generation_of
from ..runtime import memory_of
from .flags import parse

if TYPE_CHECKING:
    from ..data import Tokenizer
    from ..models import CausalLM

SEPARATOR = "\n" + "-" * 40 + "\n"
# Where neither a flag nor the model's folder says anything.
MAX_NEW_TOKENS, TEMPERATURE = 256, 0.8


@dataclass
class Options:
    """Continue a prompt with a trained model.

    The prompt and its continuation go to standard output, the rate to standard error. Without --prompt
    and --prompt-file the prompt is read from standard input; at a terminal it is then empty, and an empty
    prompt starts a new document. One newline at the end of a file or of standard input is dropped.

    What the model's folder says about generation (generation_config.json, or else config.json) holds where no flag
    says otherwise, with transformers' meaning: a folder that gives sampling settings without do_sample means the
    likeliest token. Text ends at any of the folder's ends. A line names what is said and not followed.
    """

    model: Annotated[str, arg(metavar="RUN_OR_FOLDER")]
    """run folder or checkpoint of `fastlm train`, Hugging Face folder of a GPT-2 or Llama type, or GGUF file"""
    prompt: Annotated[str | None, arg(metavar="TEXT")] = None
    """text to continue"""
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """UTF-8 file with the text to continue"""
    max_new_tokens: Annotated[int | None, arg(metavar="N")] = None
    """stop after this many tokens, if no end of text comes first; by default what the folder says, or 256"""
    temperature: Annotated[float | None, arg(metavar="T")] = None
    """below 1 sharpens the distribution, 0 always takes the likeliest token; by default what the folder says, or 0.8"""
    top_k: Annotated[int | None, arg(metavar="K")] = None
    """draw from the k likeliest tokens only; by default what the folder says, or all"""
    top_p: Annotated[float | None, arg(metavar="P")] = None
    """draw from the likeliest tokens that together reach this probability; by default what the folder says, or all"""
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
    check_tensors: bool = False
    """refuse a model whose weights hold NaN or infinities"""
    stream: bool = True
    """show text as it is sampled, or whole at the end"""


def main(argv: list[str]) -> int | None:
    return run(parse(Options, "fastlm generate", argv, config=(tyro.conf.PositionalRequiredArgs,)))


def run(options: Options) -> int:
    """Generate as `options` say.

    Raises:
        ConfigError, DataError, CheckpointError: for a setting out of range, a prompt that cannot be used,
            and a model that cannot be loaded; nothing has been written to standard output then.
    """
    _check(options)
    prompt = _read_prompt(options)
    device = _device(options.device)
    model, tokenizer = load(options.model, options.check_tensors)
    model = _held(model.eval().to(device, _dtype(options, device)), options)
    ids = _prompt_ids(prompt, tokenizer, model)
    _check_memory(options.num_samples, model, device)
    _emit(options, model, tokenizer, prompt, ids)
    return 0


def load(source: str, check_tensors: bool = False) -> tuple[CausalLM, Tokenizer]:
    """A model that continues text, and its tokenizer, as `fastlm.load_with_tokenizer`.

    Raises:
        CheckpointError: for a model that does not continue text, too.
    """
    from ..formats.load import MODELS, load_with_tokenizer
    from ..models import CausalLM

    model, tokenizer = load_with_tokenizer(source, check_tensors=check_tensors)
    if not isinstance(model, CausalLM):
        known = " or ".join(name for name, (kind, _) in MODELS.items() if issubclass(kind, CausalLM))
        raise CheckpointError(f"{source}: holds a {type(model).__name__}, expected one that continues text: {known}")
    return model, tokenizer


def _ends(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: those that the model's folder names, or else the tokenizer's."""
    ends = list(generation_of(model).ends(model.config.vocab_size))
    return ends or ([] if tokenizer.eot_id is None else [tokenizer.eot_id])


def _check(options: Options) -> None:
    check_sampling(1.0 if options.temperature is None else options.temperature, options.top_k, options.top_p)
    for name in ("max_new_tokens", "num_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    check_scheme(options.weights if options.weights == "int4" else "int8", options.group_size)
    if options.weights == "bf16" and options.dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"weights is 'bf16', but dtype is {options.dtype!r}; choose one")
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("prompt and prompt_file are both given; choose one")


def _check_memory(num_samples: int, model: CausalLM, device: torch.device) -> None:
    """Raise ConfigError for more samples than whose logits alone would fit, before any of them is made."""
    least, there = 4 * num_samples * model.config.vocab_size, memory_of(device)
    if there and least > there:
        raise ConfigError(
            f"num_samples is {shown(num_samples)}: their logits need {least / 1e9:.3g} GB, "
            f"but {device} has {there / 1e9:.3g} GB"
        )


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
        torch.zeros((), device=device).item()  # which meta cannot give
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


def _held(model: CausalLM, options: Options) -> CausalLM:
    """The model with its weights in the format asked for."""
    if options.weights is not None and quantized_layers(model):
        raise ConfigError(f"--weights is {options.weights}, but {options.model} is quantized already")
    if options.weights in ("int8", "int4"):
        quantize(model, options.weights, options.group_size)
    return model


def _prompt_ids(prompt: str, tokenizer: Tokenizer, model: CausalLM) -> list[int]:
    context_length = model.config.context_length
    ids = tokenizer.start_ids + tokenizer.encode(prompt)
    if not ids:
        begin = generation_of(model).token("bos_token_id")
        begin = begin if begin is not None and begin < model.config.vocab_size else tokenizer.eot_id
        if begin is None:
            raise ConfigError("the prompt is empty, and this tokenizer has no end-of-text token to start from")
        return [begin]
    if len(ids) > context_length:
        print(
            f"the prompt has {len(ids)} tokens, the model's context holds {context_length}: "
            f"only the last {context_length} are read",
            file=sys.stderr,
        )
    return ids[-context_length:]


class _Text:
    """One sample's text, in whole characters; the prompt's ids go in first: spacing may hang on them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], ends: list[int]):
        self.ends, self.vocab_size, self.stream = ends, tokenizer.vocab_size, tokenizer.stream()
        for token in prompt_ids:
            self.stream.push(token)
        self.tokens, self.finished = 0, False

    def push(self, token: int) -> str:
        if self.finished:
            return ""
        self.tokens += 1
        self.finished = token in self.ends
        if self.finished:
            return self.stream.flush()
        # A model's vocabulary may be padded to a round size; such an id stands for no text.
        return self.stream.push(token) if token < self.vocab_size else "\ufffd"

    def flush(self) -> str:
        return "" if self.finished else self.stream.flush()


def _emit(options: Options, model: CausalLM, tokenizer: Tokenizer, prompt: str, ids: list[int]) -> None:
    """Generate and print; the first sample goes out piece by piece, the others when all are done."""
    ends = _ends(model, tokenizer)
    texts = [_Text(tokenizer, ids, ends) for _ in range(options.num_samples)]
    pieces: list[list[str]] = [[prompt] for _ in texts]
    steps = _steps(options, model, torch.tensor([ids] * len(texts)), ends)
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


def _steps(options: Options, model: CausalLM, tokens: Tensor, ends: list[int]) -> Iterator[Tensor]:
    """The tokens as they are drawn, after a line on standard error for what the folder says and is not followed."""
    said = generation_of(model)
    count, temperature = options.max_new_tokens, options.temperature
    if count is None and said.settings.new_tokens(0) is None:
        count = MAX_NEW_TOKENS
    if temperature is None and not said.speaks_of_sampling:
        temperature = TEMPERATURE
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = generate(
            model, tokens, count, temperature=temperature, top_k=options.top_k, top_p=options.top_p,
            seed=options.seed, stop_token=ends,
        )  # fmt: skip
    for warning in caught:
        print(warning.message, file=sys.stderr)
    return steps


def _write(text: str) -> None:
    if text:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
