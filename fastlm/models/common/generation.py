"""What a model's folder says about generating with it: kept as it was read, followed, and written again.

transformers' rule holds: generation_config.json decides where it is there, else the entries of config.json do.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...errors import CheckpointError
from .config import shown

FEW_TOKENS = 20  # transformers' number of new ones where nobody says any
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
# What transformers would do something about and fastlm does not, with the values that ask for nothing.
UNFOLLOWED: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Settings:
    """The settings that are followed, under transformers' names and with its defaults; see its GenerationConfig."""

    eos_token_id: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    num_beams: int = 1
    num_return_sequences: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    def new_tokens(self, begin: int) -> int | None:
        """How many tokens may follow `begin` ones, where that is said."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        return self.max_length - begin

    def shortest(self, begin: int) -> int:
        """Length of the sequence below which it may not end."""
        return self.min_length if self.min_new_tokens is None else begin + self.min_new_tokens


@dataclass(frozen=True)
class Generation:
    """What a model carries along, as `model.generation`.

    Attributes:
        said: settings under transformers' names, as generation_config.json has them.
        ids: the ids that config.json names.

    Raises:
        CheckpointError: naming the setting that has a value which it cannot have.
    """

    said: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="generation", compare=False)
    settings: Settings = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _parsed(self.said, self.source))

    @property
    def speaks_of_sampling(self) -> bool:
        return any(self.said.get(name) is not None for name in SAMPLING)

    def token(self, name: str) -> int | None:
        """An id that is said, such as that of "bos_token_id"."""
        token = self.said.get(name)
        return None if token is None or token < 0 else token  # some files write -1 for none

    def ends(self, vocab_size: int) -> tuple[int, ...]:
        """The ids that end a text; ids that the model cannot give are not among them."""
        return tuple(token for token in self.settings.eos_token_id if token < vocab_size)

    def unfollowed(self, **others: tuple[Any, ...]) -> list[str]:
        """What is said and not followed: `others` too, unless they have one of these values."""
        names = UNFOLLOWED | others
        return [
            f"{name} {self.said[name]}"
            for name in sorted(names)
            if self.said.get(name) is not None and self.said[name] not in names[name]
        ]

    def warn_of_unfollowed(self, call: str, **others: tuple[Any, ...]) -> None:
        """One UserWarning that lists what the call will not do."""
        if found := self.unfollowed(**others):
            warnings.warn(f"{call}: {self.source} says {', '.join(found)}: not followed here", stacklevel=3)

    def with_end(self, token: int) -> Generation:
        """The same with one id that begins and ends a text."""
        ids = {"bos_token_id": token, "eos_token_id": token}
        return dataclasses.replace(self, said=self.said | ids, ids=self.ids | ids)

    def fill(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json with the ids that it leaves out and generation_config.json names."""
        absent = {name: value for name, value in self.said.items() if name.endswith("_token_id")}
        return config | {name: value for name, value in absent.items() if config.get(name) is None}

    def to_dict(self) -> dict[str, Any]:
        return {"said": self.said, "ids": self.ids}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Generation:
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: for anything else.
        """
        said, ids = (values.get(name) for name in ("said", "ids")) if isinstance(values, dict) else (None, None)
        if not isinstance(said, dict) or not isinstance(ids, dict):
            raise CheckpointError(f"{source}: its generation settings are damaged")
        return cls(said, ids, source)


def generation_of(model: nn.Module) -> Generation:
    """What a model carries along; nothing for one that was not loaded."""
    return vars(model).get("generation", NOTHING_SAID)


def carry(model: nn.Module, generation: Generation) -> None:
    """Let a model carry this along, as `model.generation`."""
    vars(model)["generation"] = generation


# Reading values


def _parsed(said: dict[str, Any], source: str) -> Settings:
    for name in IDS:
        if said.get(name) is not None and type(said[name]) is not int:
            _refuse(source, name, said[name], "an id")
    values = {}
    for each in dataclasses.fields(Settings):
        value = said.get(each.name)
        if value is None:
            continue
        wanted, read = _READERS[each.name]
        try:
            values[each.name] = read(value)
        except (TypeError, ValueError, OverflowError):
            _refuse(source, each.name, value, wanted)
    return Settings(**values)


def _refuse(source: str, name: str, value: Any, wanted: str) -> None:
    raise CheckpointError(f"{source}: {name} is {shown(value)}, expected {wanted}")


def _ids(value: Any) -> tuple[int, ...]:
    """One id or several; those below 0, as some files have them, stand for none."""
    found = [value] if type(value) is int else list(value)
    if not all(type(token) is int and token < 2**63 for token in found):
        raise ValueError
    return tuple(token for token in found if token >= 0)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_ids(list(word)) for word in value)
    if not all(words):
        raise ValueError
    return words


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """A list of pairs, or a dictionary whose keys are tuples written out."""
    if isinstance(value, dict):
        value = [(_written_out(key) if isinstance(key, str) else key, bias) for key, bias in value.items()]
    return tuple((_words([word])[0], float(bias)) for word, bias in value)


def _written_out(ids: str) -> list[int]:
    return [int(part) for part in ids.strip("()").split(",") if part.strip()]


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return int(start), _number(0.0)(factor)


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError
        return value

    return read


def _number(least: float = -math.inf, most: float = math.inf, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError
        if not least <= value <= most or (above and value == least):
            raise ValueError
        return float(value)

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _stopping(value: Any) -> bool | str:
    if value not in (True, False, "never"):
        raise ValueError
    return value if value == "never" else bool(value)


def _each(wanted: str, read: Callable[[Any], Any], names: Iterable[str]) -> dict[str, tuple[str, Callable]]:
    return dict.fromkeys(names, (wanted, read))


_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **_each(
        "an id or a list of ids", _ids,
        ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    ),
    **_each("an id", _whole(0), ("forced_bos_token_id",)),
    **_each(
        "an integer of at least 0", _whole(0),
        (
            "max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
        ),
    ),
    **_each("an integer of at least 1", _whole(1), ("num_beams", "num_return_sequences")),
    **_each("true or false", _flag, ("do_sample", "remove_invalid_values", "renormalize_logits")),
    **_each("true, false or never", _stopping, ("early_stopping",)),
    **_each("a number of at least 0", _number(0.0), ("temperature",)),
    **_each("a number", _number(), ("length_penalty",)),
    **_each("a number above 0", _number(0.0, above=True), ("repetition_penalty", "encoder_repetition_penalty")),
    **_each("a number in (0, 1]", _number(0.0, 1.0, above=True), ("typical_p",)),
    **_each("a number in [0, 1]", _number(0.0, 1.0), ("top_p", "min_p", "epsilon_cutoff", "eta_cutoff")),
    **_each("a list of lists of ids", _words, ("bad_words_ids",)),
    **_each("a list of ids with a number each", _biases, ("sequence_bias",)),
    **_each("a start and a factor", _decay, ("exponential_decay_length_penalty",)),
}  # fmt: skip

FOLLOWED = tuple(each.name for each in dataclasses.fields(Settings))
NOTHING_SAID = Generation()
