"""The tokenizer that a GGUF file holds: a byte-level BPE with the rules that llama.cpp has for its name.

Rules and names are those of llama.cpp's src/llama-vocab.cpp at 00ad355. Its normalisation is none, whatever the
tokenizer.json had that a file was made from; spaces are never cleaned up, as in what it prints token by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from ...data import Tokenizer
from ...data.library import damages, quiet_panics
from ...errors import CheckpointError, DataError
from ...models.common.config import shown
from .model import CONTROL, END_NAMES, USER_DEFINED, read_fields

_SUFFIXES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _OTHERS
_QWEN2 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _OTHERS
_QWEN35 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
# Letters of either case, told apart within ASCII alone.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _cased(suffix: str, digits: str) -> str:
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = f"{begin}{_UPPER}*{_LOWER}+{suffix}|{begin}{_UPPER}+{_LOWER}*{suffix}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES


_TEKKEN, _GPT4O = _cased("", r"\p{N}"), _cased(_SUFFIXES + "?", r"\p{N}{1,3}")


class Rules(NamedTuple):
    """How one kind of tokenizer cuts text and encodes words.

    Attributes:
        cuts: patterns of the words that no merge crosses, each applied to the pieces that the one before it leaves.
        ignore_merges: whether a word of the vocabulary is one token though no merge may lead to it.
        add_bos: whether a text begins with the start token, where the file does not say.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


RULES: dict[str, Rules] = {
    **dict.fromkeys(
        (
            "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
            "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
        ),
        Rules((_GPT2,)),
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        Rules((r"\p{N}", _GPT2)),
    ),
    **dict.fromkeys(
        (
            "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
        ),
        Rules((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Rules((_LLAMA3,))),
    **dict.fromkeys(
        (
            "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
        ),
        Rules((_QWEN2,)),
    ),
    "qwen35": Rules((_QWEN35,)),
    "tekken": Rules((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), Rules((_GPT4O,))),
}  # fmt: skip


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file; its end of text is the one that the file names.

    Raises:
        DataError: for a kind that is not known; tokenizer.json beside the file is then needed.
        CheckpointError: if the `gguf` package is missing, or the file is damaged.
    """
    fields = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in read_fields(path).items()
        if name.startswith("tokenizer.ggml.")
    }
    kind, name = fields.get("model"), fields.get("pre")
    if not fields:
        raise DataError(f"{path}: holds no tokenizer; put the model's tokenizer.json beside it")
    if kind != "gpt2" or not isinstance(name, str) or name not in RULES:
        raise DataError(
            f"{path}: its tokenizer is {shown(kind, str)} {shown(name, str)}, "
            f"expected gpt2 with one of {', '.join(RULES)}; put the model's tokenizer.json beside the file"
        )
    try:
        with quiet_panics():
            definition = _definition(fields, RULES[name])
    except BaseException as error:  # the library raises bare Exception, and panics with something else
        if not damages(error):
            raise
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error!r:.200}") from error
    tokenizer = Tokenizer(definition, str(path))
    end = fields.get("eos_token_id", tokenizer.eot_id)
    if end is not None and not (type(end) is int and 0 <= end < tokenizer.vocab_size):
        raise CheckpointError(f"{path}: eos_token_id is {end!r:.40}, expected an id below {tokenizer.vocab_size}")
    tokenizer.eot_id = end
    return tokenizer


def _definition(fields: dict[str, Any], rules: Rules) -> str:
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(fields["tokens"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(f"two tokens are {twice!r}")
    merges = [_pair(merge) for merge in fields["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated") for cut in rules.cuts]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = dict(zip(tokens, fields.get("token_type", []), strict=False))
    control = [token for token in tokens if types.get(token) == CONTROL or token in END_NAMES]
    # These are found in any text; names of control tokens are text unless they are asked for.
    added = [token for token in tokens if types.get(token) == USER_DEFINED and token not in END_NAMES]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    start = [fields["bos_token_id"]] if fields.get("add_bos_token", rules.add_bos) else []
    end = [fields["eos_token_id"]] if fields.get("add_eos_token", False) else []
    if start or end:
        around = [(tokens[index], index) for index in dict.fromkeys(start + end)]
        pieces = [*(tokens[index] for index in start), "$A", *(tokens[index] for index in end)]
        backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=around)
    return backend.to_str()


def _pair(merge: str) -> tuple[str, str]:
    """Both sides of a merge; the first may be a blank."""
    middle = merge.index(" ", 1)
    return merge[:middle], merge[middle + 1 :]
