"""Special tokens: what each objective needs, by what it is for and by the names that it goes by."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"

# What a tokenizer that is trained here gets.
TRAINED: dict[str, tuple[str, ...]] = {
    "causal": (END_OF_TEXT,),
    "masked": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "seq2seq": ("<pad>", "<s>", "</s>"),
    "chat": (END_OF_TEXT, "<|im_start|>", "<|im_end|>"),
}

# What each is for, and what other families call it; the first name that a vocabulary holds is taken.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_PAD = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "<|finetune_right_pad_id|>")
_TURN_START = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]")
_TURN_END = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[/INST]")
_NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "causal": {"end": END_NAMES},
    "masked": {"pad": _PAD, "start": ("[CLS]", "<s>"), "end": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")},
    "seq2seq": {"pad": _PAD, "start": ("<s>", "[CLS]", "<bos>", "<pad>"), "end": ("</s>", "[SEP]", "<eos>")},
    "chat": {"end": END_NAMES, "turn_start": _TURN_START, "turn_end": _TURN_END},
}


def check_objective(objective: str) -> None:
    """Raise ConfigError for a name that is none."""
    if objective not in TRAINED:
        raise ConfigError(f"special={objective!r}, expected one of {', '.join(TRAINED)}")


def special_ids(vocabulary: Mapping[str, int], objective: str, source: str) -> dict[str, int]:
    """Ids of what an objective needs, by what it is for.

    Raises:
        DataError: the vocabulary lacks one of them.
    """
    check_objective(objective)
    found = {}
    for purpose, names in _NEEDED[objective].items():
        name = next((name for name in names if name in vocabulary), None)
        if name is None:
            raise DataError(f"{source}: has no token {' or '.join(names)} ({purpose}), which special={objective} needs")
        found[purpose] = vocabulary[name]
    return found
