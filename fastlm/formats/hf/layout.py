"""Models in Hugging Face's layout: what an architecture is, and how its folders are loaded and saved.

An `Architecture` says how settings become a configuration and back, and under which names a folder keeps the
tensors: a tensor of ours may be several of theirs, stacked along the first dimension (the fused query, key and
value projection), or transposed (`Conv1D`). Each family, or group of relatives, has a module beside this;
`architectures.py` is the table of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..._core.tensor_file import Stored
from ...errors import CheckpointError, ConfigError
from ...models.common.config import ModelConfig, shown
from ...models.common.generation import FOLLOWED, IDS, UNFOLLOWED, Generation, carry, generation_of
from ..filling import blank, fill, non_finite, share
from ..saving import state_to_save
from .files import CONFIG, GENERATION, listed, read_json, read_tensors, write_folder

NOTHING = re.compile(r"(?!)")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
SHARD_BYTES = 5 * 10**9


class Settings:
    """A config.json, or an object in it (`inside.`), whose complaints name the file.

    The values that are only handed on to a configuration are checked there.
    """

    def __init__(self, values: dict[str, Any], path: Path, inside: str = ""):
        self.values, self.path, self.inside = values, path, inside

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> Any:
        """An integer of 64 bits; null only where it is the default. So for the other kinds."""
        value = self._typed(name, default, (int,), "an integer")
        if value is not None and not -(2**63) <= value < 2**63:
            self.refuse(f"{name} is {shown(value)}, expected one of 64 bits")
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        value = self._typed(name, default, (int, float), "a number")
        if value is None:
            return None
        if not -sys.float_info.max <= value <= sys.float_info.max:
            self.refuse(f"{name} is {shown(value)}, expected a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return self._typed(name, default, (bool,), "true or false")

    def sequence(self, name: str) -> list[Any] | None:
        return self._typed(name, None, (list,), "a list")

    def mapping(self, name: str) -> dict[str, Any] | None:
        return self._typed(name, None, (dict,), "an object")

    def _typed(self, name: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name, default)
        if value is default or type(value) in kinds:
            return value
        return self.refuse(f"{name} is {shown(value, json.dumps)}, expected {wanted}")

    def require(self, *names: str) -> None:
        if missing := [name for name in names if name not in self.values]:
            self.refuse(f"missing {', '.join(self.inside + name for name in missing)}", named=False)

    def expect(self, name: str, *wanted: Any) -> Any:
        """The value, or the first that is wanted if there is none; refuse what would load and compute otherwise."""
        value = self.values.get(name, wanted[0])
        if value not in wanted:
            text = " or ".join(json.dumps(value) for value in wanted)
            self.refuse(f"{name} is {shown(value, json.dumps)}, expected {text}")
        return value

    def one_rate(self, chosen: float | None, names: tuple[str, ...], default: float) -> float:
        """The dropout rate that `names` agree on, or the one that the caller has chosen."""
        if chosen is not None:
            return chosen
        rates = {name: self.number(name, default) for name in names}
        if len(set(rates.values())) > 1:
            text = ", ".join(f"{name} {rate}" for name, rate in rates.items())
            self.refuse(f"{text}: fastlm has one rate; pass dropout= to choose it")
        return rates[names[-1]]

    def refuse(self, problem: str, named: bool = True) -> NoReturn:
        """Raise a CheckpointError for a problem whose text begins with the name of a value, or not."""
        raise CheckpointError(f"{self.path}: {self.inside if named else ''}{problem}")


class Part(NamedTuple):
    """A tensor of the checkpoint: the next `rows` of one of the model's, `as_is`, `transposed` or as `one_row`."""

    name: str
    rows: int
    form: str = "as_is"

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        shape = (self.rows, *ours[1:])
        return {"as_is": shape, "transposed": shape[::-1], "one_row": (1, *shape)}[self.form]

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return {"as_is": tensor, "transposed": tensor.t(), "one_row": tensor[None]}[self.form]

    def to_ours(self, tensor: Tensor) -> Tensor:
        return {"as_is": tensor, "transposed": tensor.t(), "one_row": tensor.flatten()}[self.form]


@dataclass(frozen=True)
class Architecture:
    """How one family of models lies in a folder.

    Attributes:
        family: its name, which is config.json's model_type.
        model, config: our classes; relatives share them.
        read: (settings, dropout rate or None) -> our configuration.
        write: our configuration -> settings, or a ConfigError that says what theirs cannot express.
        names: our configuration -> {our module, layer numbers as `*`: their modules}; a module that is not there
            has our name.
        rows: our configuration -> {our module: rows of each of their modules in it}, where these are not alike.
        prefix: what models with a head put before the names of the base model's tensors.
        unprefixed: beginnings of the names that have no prefix.
        headless: their class of the base model alone, whose names have no prefix.
        transposed, one_row: which of their tensors are kept transposed, or as a matrix of one row.
        stray: our configuration -> which of their tensors are no parameters of this model.
        aliases: our configuration -> {their name: their name of the tensor that it is tied to}.
        untied: our configuration -> the one of the same model with none of them tied.
        renamed: {old ending of a name: today's}.
        generates: whether theirs has a `generate`.
        added: (our configuration, their tensors by name) -> tensors that theirs has besides.
    """

    family: str
    model: type[nn.Module]
    config: type[ModelConfig]
    read: Callable[[Settings, float | None], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], dict[str, tuple[str, ...]]]
    prefix: str
    unprefixed: tuple[str, ...]
    rows: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    headless: str = ""
    transposed: re.Pattern[str] = NOTHING
    one_row: re.Pattern[str] = NOTHING
    stray: Callable[[Any], re.Pattern[str]] = lambda config: NOTHING
    aliases: Callable[[Any], dict[str, str]] = lambda config: {}
    untied: Callable[[Any], Any] = lambda config: dataclasses.replace(config, tie_embeddings=False)
    renamed: tuple[tuple[str, str], ...] = ()
    generates: bool = True
    added: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda config, tensors: {}

    def parts(self, config: Any, shapes: dict[str, torch.Size]) -> dict[str, list[Part]]:
        """For each of our tensors those of theirs that it is stacked from."""
        names, rows = self.names(config), self.rows(config)
        return {ours: self._parts_of(ours, shape, names, rows) for ours, shape in shapes.items()}

    def _parts_of(
        self, ours: str, shape: torch.Size, names: dict[str, tuple[str, ...]], rows: dict[str, tuple[int, ...]]
    ) -> list[Part]:
        module, _, leaf = ours.rpartition(".")
        numbers = re.findall(r"\.(\d+)(?=\.|$)", module)
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", module)
        # A parameter of the model itself, such as a bias of the logits, is listed by its own name.
        modules = names.get(ours) or tuple(f"{name}.{leaf}" for name in names.get(pattern, (pattern,)))
        sizes = rows.get(pattern, (shape[0] // len(modules),) * len(modules))
        theirs = [_fill(name, numbers) for name in modules]
        return [Part(name, size, self._form(name)) for name, size in zip(theirs, sizes, strict=True)]

    def _form(self, name: str) -> str:
        if self.transposed.fullmatch(name):
            return "transposed"
        return "one_row" if self.one_row.fullmatch(name) else "as_is"

    def full_name(self, name: str, with_head: bool) -> str:
        return name if not with_head or name.startswith(self.unprefixed) else f"{self.prefix}{name}"


def _fill(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = name.replace("*", number, 1)
    return name


def load(
    folder: str | os.PathLike[str],
    dropout: float | None = None,
    dtype: torch.dtype | None = None,
    model: type[nn.Module] | None = None,
    check_tensors: bool = False,
) -> nn.Module:
    """Load a folder of any known architecture, or of that of the class `model` alone; see `fastlm.load`.

    Raises:
        CheckpointError: for missing or damaged files, an architecture that is not known, a setting that it does
            not have here, and missing, extra or misshapen tensors, by name.
    """
    folder = Path(folder)
    settings = Settings(read_json(folder / CONFIG), folder / CONFIG)
    architecture = _architecture(settings, model)
    generation = read_generation(folder, settings.values, architecture.generates)
    settings = Settings(generation.fill(settings.values), settings.path)
    loaded = assemble(architecture, settings, lambda: read_tensors(folder), folder, dropout, dtype, check_tensors)
    carry(loaded, generation)
    return loaded


def read_generation(folder: Path, config: dict[str, Any], generates: bool) -> Generation:
    """What the folder of a `config` says about generating; of a model that does not generate only what a file says.

    Raises:
        CheckpointError: for a damaged file, or a setting with a value that it cannot have.
    """
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    if (folder / GENERATION).is_file():
        return Generation(read_json(folder / GENERATION), ids, str(folder / GENERATION))
    names = (*FOLLOWED, *IDS, *UNFOLLOWED) if generates else ()
    said = {name: config[name] for name in names if config.get(name) is not None}
    return Generation(said, ids, str(folder / CONFIG))


def assemble(
    architecture: Architecture,
    settings: Settings,
    read: Callable[[], dict[str, Stored]],
    source: Path,
    dropout: float | None,
    dtype: torch.dtype | None,
    check_tensors: bool = False,
) -> nn.Module:
    """A model from settings and tensors in Hugging Face's names, wherever they come from.

    Sizes are compared before any tensor is read, and tensors are read one at a time.
    """
    try:
        config = dataclasses.replace(architecture.read(settings, dropout), family=architecture.family)
    except ConfigError as error:
        raise CheckpointError(f"{settings.path}: {error}") from error
    stored = read()
    config, tensors = _canonical(architecture, config, stored, source)
    model = blank(architecture.model, config, len(stored), settings.path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parts = architecture.parts(config, shapes)
    _check(tensors, parts, shapes, source, settings.path.name)
    problems: list[str] | None = [] if check_tensors else None
    wanted = dtype or torch.float32
    used = [(tensors[part.name], part) for group in parts.values() for part in group]
    scratch = _scratch([stored for stored, part in used if not _reads_in_place(stored, part, wanted)])
    state = {name: _stack(tensors, parts[name], shape, wanted, scratch, problems) for name, shape in shapes.items()}
    if problems:
        raise CheckpointError(f"{source}: {listed(problems)}")
    fill(model, state)
    share(model, _same_parts(tensors, parts))
    return model


def save(model: nn.Module, folder: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES, **settings: Any) -> None:
    """Write a folder that transformers loads: config.json and safetensors, see `write_folder`.

    What the model carries along about generating is written as it was read.

    Args:
        settings: added to config.json, and to generation_config.json where there is one.

    Raises:
        CheckpointError: for a model that has no architecture there, and if the files cannot be written.
    """
    written, tensors = export(model)
    generation = generation_of(model)
    said = generation.said | settings if generation.said else {}
    write_folder(Path(folder), written | generation.ids | settings, tensors, shard_bytes, said)


def export(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a model in Hugging Face's terms; the tensors are views where they can be.

    Raises:
        CheckpointError: for a model that has no architecture there, or whose tensors `load` would not take.
    """
    from .architectures import ARCHITECTURES

    found = [a for a in ARCHITECTURES if type(model) is a.model]
    if not found:
        known = ", ".join(sorted({a.model.__name__ for a in ARCHITECTURES}))
        raise CheckpointError(f"{type(model).__name__} has no Hugging Face layout here; those that have: {known}")
    state = {name: tensor.cpu() for name, tensor in state_to_save(model).items()}
    config: Any = model.config
    architecture, settings = _expressed(found, config, type(model).__name__)
    with_head = settings["architectures"][0] != architecture.headless
    tensors: dict[str, Tensor] = {}
    for name, parts in architecture.parts(config, {name: t.shape for name, t in state.items()}).items():
        stacked = state[name].split([part.rows for part in parts])
        for part, tensor in zip(parts, stacked, strict=True):
            tensors[architecture.full_name(part.name, with_head)] = part.to_theirs(tensor)
    tensors |= architecture.added(config, tensors)
    dtype = next(iter(state.values())).dtype
    return settings | {"dtype": str(dtype).removeprefix("torch.")}, tensors


def _expressed(relatives: list[Architecture], config: Any, name: str) -> tuple[Architecture, dict[str, Any]]:
    """The relative that a configuration is of, or the first that has all of its settings, and config.json's entries."""
    refused = []
    for architecture in sorted(relatives, key=lambda relative: relative.family != config.family):
        try:
            return architecture, {"model_type": architecture.family, **architecture.write(config)}
        except ConfigError as error:
            refused.append(str(error))
    raise CheckpointError(f"{name}: {'; '.join(refused)}")


def _architecture(settings: Settings, model: type[nn.Module] | None) -> Architecture:
    from .architectures import ARCHITECTURES

    known = [a for a in ARCHITECTURES if model is None or a.model is model]
    types = [a.family for a in known]
    if model is None and "model_type" not in settings.values:
        settings.refuse(f"missing model_type, expected one of {', '.join(types)}")
    wanted = settings.expect("model_type", *types)
    return next(a for a in known if a.family == wanted)


def _canonical(
    architecture: Architecture, config: Any, stored: dict[str, Stored], source: Path
) -> tuple[Any, dict[str, Stored]]:
    """Tensors under today's names, without prefix, strays and second names; untied where the file has two that differ.

    An untied configuration has a tensor for each of the tied names; those that are equal, or that the file lacks,
    stay one tensor, as in transformers.
    """
    named: dict[str, Stored] = {}
    for name, tensor in stored.items():
        name = name.removeprefix(architecture.prefix)
        for old, new in architecture.renamed:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        named[name] = tensor
    ties = architecture.aliases(config)
    for alias, name in ties.items():
        if alias in named:
            named.setdefault(name, named[alias])
    apart = {alias: name for alias, name in ties.items() if alias in named and not _equal(named[alias], named[name])}
    if apart:
        config = architecture.untied(config)
        pairs = ", ".join(f"{named[alias].name} differs from {named[name].name}" for alias, name in apart.items())
        warnings.warn(
            f"{source}: {pairs}, but config.json ties them: loaded untied, "
            "as tie_word_embeddings: false in config.json would say",
            stacklevel=5,
        )
    for alias in ties.keys() - apart.keys():
        named.pop(alias, None)
        if apart and ties[alias] in named:
            named[alias] = named[ties[alias]]
    stray = architecture.stray(config)
    return config, {name: tensor for name, tensor in named.items() if not stray.fullmatch(name)}


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors of a file are the same numbers, not numbers included."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    a, b = one.read(None).flatten(), other.read(None).flatten()
    # In pieces: the comparison's temporaries are as large as what is compared.
    return all(
        torch.allclose(x.double(), y.double(), rtol=0, atol=0, equal_nan=True)
        for x, y in zip(a.split(2**20), b.split(2**20), strict=True)
    )


def _same_parts(tensors: dict[str, Stored], parts: dict[str, list[Part]]) -> dict[str, str]:
    """{our name: an earlier one that is made of the very same tensor}."""
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(tensors[p[0].name]), name) for name, p in parts.items() if len(p) == 1}
    return {name: owner for name, owner in owners.items() if name != owner}


def _check(
    tensors: dict[str, Stored],
    parts: dict[str, list[Part]],
    shapes: dict[str, torch.Size],
    source: Path,
    config_name: str,
) -> None:
    """Compare what the files hold with what the settings call for, all of it at once."""
    wanted = {part.name: part.shape(shapes[ours]) for ours, group in parts.items() for part in group}
    problems = [
        f"{kind} {listed(sorted(names))}"
        for kind, names in (
            ("missing", wanted.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - wanted.keys()),
        )
        if names
    ]
    misfits = [
        f"{name} has shape {tensors[name].shape} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name]
    ]
    misfits += [
        f"{name} is {tensors[name].dtype}, expected a floating-point dtype"
        for name in sorted(wanted.keys() & tensors.keys())
        if not tensors[name].dtype.is_floating_point
    ]
    if misfits:
        problems.append(listed(misfits))
    if problems:
        raise CheckpointError(f"{source}: the tensors do not fit {config_name}: {'; '.join(problems)}")


def _reads_in_place(stored: Stored, part: Part, dtype: torch.dtype) -> bool:
    """Whether the file's bytes are those of ours."""
    return stored.dtype == dtype and part.form != "transposed"


def _scratch(tensors: list[Stored]) -> Tensor:
    """Bytes for the largest: temporary tensors between those that stay would leave holes that stay resident too."""
    return torch.empty(max((math.prod(t.shape) * t.dtype.itemsize for t in tensors), default=0), dtype=torch.uint8)


def _stack(
    tensors: dict[str, Stored],
    parts: list[Part],
    shape: torch.Size,
    dtype: torch.dtype,
    scratch: Tensor,
    problems: list[str] | None,
) -> Tensor:
    """One of our tensors, read part by part; `problems`, if any, takes what is not finite in it."""
    stacked = torch.empty(shape, dtype=dtype)
    for part, rows in zip(parts, stacked.split([part.rows for part in parts]), strict=True):
        stored = tensors[part.name]
        if _reads_in_place(stored, part, dtype):
            stored.read(rows.view(stored.shape))
        else:
            held = scratch[: math.prod(stored.shape) * stored.dtype.itemsize].view(stored.dtype).view(stored.shape)
            rows.copy_(part.to_ours(stored.read(held)))
        if problems is not None and (found := non_finite(rows)):
            problems.append(f"{stored.name} holds {found}")
    return stacked
