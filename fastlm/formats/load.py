"""`fastlm.load` and `fastlm.save`: any model, from and to any format that is known."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, DataError
from ..models.common.config import shown
from ..models.common.generation import NOTHING_SAID, Generation, carry
from .filling import blank, fill, non_finite, share
from .hf.architectures import ARCHITECTURES
from .hf.files import CONFIG, PICKLES, listed
from .hf.layout import SHARD_BYTES
from .hf.layout import load as load_folder
from .hf.layout import save as save_folder
from .saving import state_to_save

if TYPE_CHECKING:
    from ..data import Tokenizer
    from .checkpoint import Checkpoint

MODELS: dict[str, tuple[type[nn.Module], Any]] = {a.model.__name__: (a.model, a.config) for a in ARCHITECTURES}
SHARED = "shared_parameters"  # of a checkpoint's state


class Form(NamedTuple):
    """A form of a model that a layer above reads and writes as safetensors, and the models that have it."""

    holds: Callable[[nn.Module], bool]
    read: Callable[[Path], nn.Module]
    write: Callable[[nn.Module, Path], None]


FORMS: dict[str, Form] = {}  # by the name of the format in the file
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def load(
    path: str | os.PathLike[str],
    *,
    dropout: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    check_tensors: bool = False,
) -> nn.Module:
    """Load a model, in evaluation mode, from whatever lies at `path`.

    Args:
        path: a Hugging Face folder (config.json with safetensors, whole or sharded, or a pickle of tensors) of
            GPT-2, BERT, RoBERTa, Llama, Mistral, Qwen2, Qwen3, Phi-3 or Marian; a GGUF file of a Llama type, which is
            dequantized (needs the `gguf` package); a run folder of `fastlm train`, which stands for its best
            checkpoint or, without one, its last; a checkpoint file; or a file of `save_quantized`.
        dropout: replaces the rates of a folder or GGUF file, for training on.
        dtype: of the parameters.
        device: where they go.
        check_tensors: refuse tensors that hold NaN or infinities, in `dtype`, with their names and how many there are.

    Returns:
        A model of `fastlm.models`, by what the file says. Its `generation` keeps what the file says about generating
        (ids, lengths, sampling, beams), which the functions of `fastlm.inference` follow and `save` writes again, and
        its `config.family` the relative that it is of.

    Raises:
        CheckpointError: for nothing or nothing known at `path`; an architecture that is not known, with those that
            are; a setting that is not supported; missing, extra or misshapen tensors, by name; a pickle that
            holds more than tensors. What a file's settings and headers say is compared with its size before any
            model is built, and never more than one copy of the weights and one tensor is held.

    Warns:
        UserWarning: for a folder whose config.json ties two tensors that differ: it is loaded untied, as in
            transformers.
    """
    path = resolve(path)
    if path.is_dir():
        model = load_folder(path, dropout, dtype, check_tensors=check_tensors)
    elif path.suffix == ".gguf":
        from .gguf.model import load_gguf

        model = load_gguf(path, dropout, dtype, check_tensors)
    elif path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: tensors alone do not say which model they are of; expected a folder with config.json "
            f"beside {PICKLES[0]} or model.safetensors"
        )
    else:
        model = _load_checkpoint(path, dtype)
        if check_tensors:
            check_finite(path, model)
    return model.to(device, dtype).eval()


def load_with_tokenizer(
    path: str | os.PathLike[str],
    *,
    dropout: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    check_tensors: bool = False,
) -> tuple[nn.Module, Tokenizer]:
    """As `load`, with the tokenizer: tokenizer.json (or vocab.json and merges.txt) in the folder or beside the file, or
    else what a GGUF file holds of it.

    Raises:
        CheckpointError: as `load`; and for a tokenizer that the model was not trained with, or whose vocabulary is
            larger than the model's.
        DataError: for a missing or damaged tokenizer.
    """
    from .tokenizer import check_trained_with, tokenizer_of

    path = resolve(path)
    model = load(path, dropout=dropout, dtype=dtype, device=device, check_tensors=check_tensors)
    tokenizer = tokenizer_of(path)
    check_trained_with(path, tokenizer)
    size = getattr(model.config, "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, but the model's vocabulary is {size}"
        )
    return model, tokenizer


def resolve(path: str | os.PathLike[str]) -> Path:
    """What `path` stands for: a Hugging Face folder, a GGUF file, a checkpoint, or whatever file it names.

    Raises:
        CheckpointError: if there is nothing at `path`, or a folder that holds none of these.
    """
    from .checkpoint import BEST, LAST, PREVIOUS

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_file() or (path / CONFIG).is_file():
        return path
    for name in (BEST, LAST, PREVIOUS):  # the last alone after a crash between two renames
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path}: has {listed([file.name for file in files])}; expected the path of one of them")
    if not files:
        raise CheckpointError(f"{path}: expected {CONFIG}, {BEST}, {LAST} or one .gguf file in it")
    return files[0]


def restore(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that a checkpoint is of; its tensors are taken out of the checkpoint, so that none is there twice.

    Raises:
        CheckpointError: for a class or a configuration that is not known, and tensors that do not fit it.
    """
    from .checkpoint import check_fit

    name = checkpoint.state.get("model", "GPT")  # training's own checkpoints are of GPTs
    kind, config = described(name, checkpoint.model_config, checkpoint.path)
    model = blank(kind, config, len(checkpoint.tensors), checkpoint.path)
    wanted = model.state_dict()
    owners = _owners(checkpoint, wanted)
    check_fit(checkpoint, "model", {name: tensor for name, tensor in wanted.items() if name not in owners})
    state = {}
    for name, tensor in wanted.items():
        stored = checkpoint.tensors.pop(f"model.{name}", tensor)
        if not stored.is_floating_point():
            raise CheckpointError(f"{checkpoint.path}: {name} is {stored.dtype}, expected a floating-point dtype")
        state[name] = stored.to(dtype)
    fill(model, state)
    share(model, owners)
    if checkpoint.generation is not None:
        carry(model, Generation.from_dict(checkpoint.generation, str(checkpoint.path)))
    elif (token := _end_beside(checkpoint)) is not None:
        carry(model, NOTHING_SAID.with_end(token))
    return model


def described(name: Any, settings: Any, source: Path) -> tuple[type[nn.Module], Any]:
    """The class and the configuration that a file names.

    Raises:
        CheckpointError: if there is no such class, or it has no such configuration.
    """
    if not isinstance(name, str) or name not in MODELS:
        raise CheckpointError(f"{source}: holds a {shown(name, str)}, expected one of {', '.join(MODELS)}")
    kind, config = MODELS[name]
    try:
        return kind, config.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its model configuration is not one of a {name}: {error}") from None


def _owners(checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> dict[str, str]:
    """{a parameter: the one that it is}, for parameters that were one and the same when they were saved."""
    owners = checkpoint.state.get(SHARED, {})
    fits = isinstance(owners, dict) and all(
        name in wanted
        and isinstance(owner, str)
        and owner in wanted.keys() - owners.keys()
        and wanted[name].shape == wanted[owner].shape
        for name, owner in owners.items()
    )
    if not fits:
        raise CheckpointError(f"{checkpoint.path}: its list of shared parameters is damaged")
    return owners


def check_finite(path: Path, model: nn.Module) -> None:
    """Raise CheckpointError for tensors that hold NaN or infinities, with their names and how many there are."""
    problems = [f"{name} holds {found}" for name, t in model.state_dict().items() if (found := non_finite(t))]
    if problems:
        raise CheckpointError(f"{path}: {listed(problems)}")


def _end_beside(checkpoint: Checkpoint) -> int | None:
    """The end of text of the tokenizer that lies beside a training run's checkpoint."""
    from ..data import Tokenizer

    file = checkpoint.path.parent / "tokenizer.json"
    if not checkpoint.tokenizer_fingerprint or not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.load(file)
    except DataError:  # whoever needs the tokenizer will say so
        return None
    return tokenizer.eot_id if tokenizer.fingerprint == checkpoint.tokenizer_fingerprint else None


def save(model: nn.Module, path: str | os.PathLike[str], format: str = "hf", shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model so that `load` reads it again.

    Args:
        model: one of `fastlm.models`.
        path: a folder; for "fastlm" a folder or a file that ends in .safetensors.
        format: "hf", a folder that transformers loads (a Seq2Seq as Marian, where it is one: without a bias of
            the logits it is given one of zeros), or "fastlm", a checkpoint, or what `save_quantized` writes.
        shard_bytes: size of a safetensors file of "hf" that is not exceeded where more than one tensor is in it.

    Raises:
        ConfigError: for another format.
        CheckpointError: for a model that the format cannot express, or whose tensors `load` would not take
            (pruned, parametrized, sharded ones), and if the files cannot be written; older ones are then untouched.
    """
    if format == "hf":
        save_folder(model, path, shard_bytes)
    elif format == "fastlm":
        _save_checkpoint(model, Path(path))
    else:
        raise ConfigError(f"format is {format!r}, expected hf or fastlm")


def _load_checkpoint(path: Path, dtype: torch.dtype) -> nn.Module:
    from .checkpoint import format_of, load_checkpoint

    in_folder = path.with_name(CONFIG).is_file()
    if in_folder and (path.suffix == ".json" or format_of(path) in ("", "pt")):
        raise CheckpointError(f"{path}: is one file of a Hugging Face folder; expected the folder, {path.parent}")
    if form := FORMS.get(format_of(path)):
        return form.read(path)
    return restore(load_checkpoint(path, model_only=True), dtype)


def _save_checkpoint(model: nn.Module, path: Path) -> None:
    from .checkpoint import BEST, save_checkpoint

    name = type(model).__name__
    if type(model) not in [kind for kind, _ in MODELS.values()]:
        raise CheckpointError(f"{name} is no model of fastlm; those are {', '.join(MODELS)}")
    file = path if path.suffix == ".safetensors" else path / BEST
    if form := next((form for form in FORMS.values() if form.holds(model)), None):
        form.write(model, file)
        return
    state_to_save(model)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{file.parent}: cannot be made: {error}") from error
    first: dict[int, str] = {}
    owners = {key: first.setdefault(id(tensor), key) for key, tensor in model.state_dict(keep_vars=True).items()}
    shared = {key: owner for key, owner in owners.items() if key != owner}
    save_checkpoint(file, model, state={"model": name} | ({SHARED: shared} if shared else {}))
