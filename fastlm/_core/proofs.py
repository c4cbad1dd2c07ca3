"""Proofs: which GPU kernels were right on a GPU, and how fast, as `fastlm tune` found them there.

A proof is one JSON file for one `Key`; docs/design/tune.md says what is in it. `dispatch` asks `find` about a request,
at its first call on a device, and keeps the answer with the choice that it remembers. The user's own proofs lie in the
cache folder, or where FASTLM_PROOFS says; proofs of real machines that come with the package lie in `SHIPPED`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import DataError
from ..runtime import driver_version
from .architecture import architecture
from .files import held, replace_text

FORMAT, VERSION = "fastlm-proof", 1
VERDICTS = ("right", "wrong", "crashed", "hung")
SHIPPED = Path(__file__).resolve().parents[1] / "proofs"
TUNE = "run `fastlm tune`"
TRITON_PACKAGES = ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton")
# Features of a request that change no kernel: every training step writes the log-sum-exp.
TILES = "tiles"  # in place of a class: the entry of a search for tiles, which is no verdict on a kernel
NO_CLASS = ("lse", "short_decode")

T = TypeVar("T")


class Properties(NamedTuple):
    """What a device says of itself: "NVIDIA H200", "sm_90" or "gfx942", its driver, "CUDA 12.8" or "ROCm 6.4"."""

    device: str
    architecture: str
    driver: str
    runtime: str


class Key(NamedTuple):
    """All that a proof depends on: it holds for what agrees in every field, and for nothing else."""

    device: str
    architecture: str
    driver: str
    runtime: str
    torch: str
    triton: str
    kernels: str  # hash of the Triton kernels' sources
    cuda_kernels: str  # hash of the sources that the CUDA extension was built from; empty without it

    @property
    def file_name(self) -> str:
        device = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.device} {self.architecture}").strip("-").lower()
        return f"{device[:60]}-{hashlib.sha256(json.dumps(self).encode()).hexdigest()[:12]}.json"


FIELDS = {
    "device": "GPU", "architecture": "architecture", "driver": "driver", "runtime": "runtime", "torch": "torch",
    "triton": "triton", "kernels": "Triton kernels", "cuda_kernels": "CUDA kernels",
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """One pass of one call.

    Attributes:
        shape, variant: of the benchmark's case.
        which: "fwd", "bwd", or "full" for both.
        size: the request's size class.
        seconds: by backend: the one that the entry is of, and what serves where it does not.
    """

    shape: tuple[int, ...]
    variant: str
    which: str
    size: tuple[int, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Entry:
    """What is known of an op's backend in one dtype, for one class of features.

    Attributes:
        features: as `feature_class` says.
        verdict: one of `VERDICTS`.
        date: when, such as "2026-11-29".
        samples: random calls that were checked.
        reason: what went wrong, or "".
        command: what repeats that, or "".
        timings: those of a right one.
        skipped: cases that could not be timed, and why.
        tiles: rows of the kernels' tables for which the search found a better one, by the row's name.
    """

    op: str
    backend: str
    dtype: str
    features: str
    verdict: str
    date: str
    samples: int = 0
    reason: str = ""
    command: str = ""
    timings: tuple[Timing, ...] = ()
    skipped: tuple[str, ...] = ()
    tiles: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> tuple[str, str, str, str]:
        return self.op, self.backend, self.dtype, self.features

    @property
    def refuses(self) -> bool:
        """Whether it is a verdict against a kernel."""
        return self.verdict != "right" and self.features != TILES


Entries = dict[tuple[str, str, str, str], Entry]


@dataclass
class Proof:
    key: Key
    entries: Entries = field(default_factory=dict)


# ---- keys ------------------------------------------------------------------------------------------------------------


def properties(index: int) -> Properties | None:
    """Those of a GPU; None where there is none of that number."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    found = torch.cuda.get_device_properties(index)
    return Properties(found.name, str(architecture(index)), driver_version() or "unknown", runtime())


def runtime() -> str:
    """What torch was built for: "CUDA 12.8", "ROCm 6.4", or "CUDA none"."""
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"


def key_of(device: Properties) -> Key:
    """The key of a proof made now, on a device with these properties."""
    return Key(*device, torch.__version__, triton_version(), kernel_sources(), cuda_kernel_sources())


def triton_version() -> str:
    """Without importing it; empty where it is not installed."""
    if "triton" in sys.modules:
        return getattr(sys.modules["triton"], "__version__", "")
    for name in TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


@functools.cache
def kernel_sources() -> str:
    """Hash of the Triton kernels' sources."""
    return hash_of("fastlm.kernels")


cuda_kernel_sources: Callable[[], str] = str
"""() -> a hash of what the CUDA kernels were compiled from, "" without them; fastlm.backends says it."""


def hash_of(package: str, *more: str) -> str:
    """Hash of a package's sources, which are not imported, and of what else is given."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    found = hashlib.sha256("\0".join(more).encode())
    for path in sorted(folder.rglob("*.py")):
        found.update(f"\0{path.relative_to(folder).as_posix()}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def feature_class(features: tuple) -> str:
    """The class that a request's features are of: "plain", the one that is on, or "several".

    Numbers are a matter of size.
    """
    on = [name if value is True else f"{name}={value}" for name, value in features
          if name not in NO_CLASS and value not in (False, None, "none") and not _is_number(value)]  # fmt: skip
    return "several" if len(on) > 1 else on[0] if on else "plain"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- files -----------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the user's own proofs lie."""
    given = os.environ.get("FASTLM_PROOFS")
    if given:
        return Path(given)
    try:
        import platformdirs
    except ImportError:  # installed without what it depends on; the same on Linux
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(cache) / "fastlm" / "proofs"
    return Path(platformdirs.user_cache_dir("fastlm", appauthor=False)) / "proofs"


def dump(proof: Proof) -> str:
    """The text of a proof's file: an entry a line."""
    entries = ",\n".join("  " + json.dumps(dataclasses.asdict(entry)) for _, entry in sorted(proof.entries.items()))
    head = json.dumps({"format": FORMAT, "version": VERSION, "key": proof.key._asdict()}, indent=1)
    return head.removesuffix("\n}") + f',\n "entries": [\n{entries}\n ]\n}}\n'


def load(path: Path) -> Proof:
    """Read a proof's file.

    Raises:
        DataError: if it is none, is damaged or of another version; the message says where.
        OSError: if it cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path}: not a proof (its format is not {FORMAT!r})")
    if document.get("version") != VERSION:
        raise DataError(f"{path}: a proof of version {document.get('version')}, this fastlm reads {VERSION}")
    try:
        key = Key(**{name: _typed(value, str, name) for name, value in _typed(document["key"], dict, "key").items()})
        entries = [_entry(raw) for raw in _typed(document["entries"], list, "entries")]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    return Proof(key, {entry.name: entry for entry in entries})


def _typed(value: Any, kind: type[T], name: str) -> T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r:.60}, expected {kind.__name__}")
    return value


def _integers(value: Any, name: str) -> tuple[int, ...]:
    return tuple(_typed(each, int, name) for each in _typed(value, list, name))


def _entry(raw: Any) -> Entry:
    raw = dict(_typed(raw, dict, "an entry"))
    for name in ("op", "backend", "dtype", "features", "verdict", "date", "reason", "command"):
        _typed(raw[name], str, name)
    if raw["verdict"] not in VERDICTS:
        raise ValueError(f"verdict is {raw['verdict']!r:.60}, expected one of {', '.join(VERDICTS)}")
    _typed(raw["samples"], int, "samples")
    raw["timings"] = tuple(_timing(each, raw["backend"]) for each in _typed(raw["timings"], list, "timings"))
    raw["skipped"] = tuple(_typed(each, str, "skipped") for each in _typed(raw["skipped"], list, "skipped"))
    raw["tiles"] = {row: _tile(row, tile) for row, tile in _typed(raw["tiles"], dict, "tiles").items()}
    return Entry(**raw)


def _tile(row: str, tile: Any) -> tuple[int, ...]:
    """The numbers in place of those of a row, as in "gelu.FORWARD 1024,2048,4,1,1"."""
    found = _integers(tile, "tiles")
    if not re.fullmatch(r"[\w.]+ \d+(,\d+)*", row) or row.count(",") + 1 != len(found) or min(found) < 1:
        raise ValueError(f"a tile of {row!r:.60} is {found}, expected as many numbers above 0")
    return found


def _timing(raw: Any, backend: str) -> Timing:
    raw = dict(_typed(raw, dict, "a timing"))
    if raw["which"] not in ("fwd", "bwd", "full"):
        raise ValueError(f"which is {raw['which']!r:.60}, expected fwd, bwd or full")
    _typed(raw["variant"], str, "variant")
    for name, seconds in _typed(raw["seconds"], dict, "seconds").items():
        if not 0 < _typed(seconds, float, name) < math.inf:
            raise ValueError(f"seconds of {name} is {seconds}, expected a number above 0")
    if len(raw["seconds"]) != 2 or backend not in raw["seconds"]:
        raise ValueError(f"seconds are of {', '.join(raw['seconds'])}, expected of {backend} and of one other")
    return Timing(**raw | {"shape": _integers(raw["shape"], "shape"), "size": _integers(raw["size"], "size")})


def add(key: Key, entries: list[Entry], afresh: bool = False) -> Path:
    """Put entries into the user's proof of `key`, beside those that are there, whole or not at all.

    Safe among several processes, whose entries are all kept. A damaged file is replaced.

    Args:
        afresh: forget what is there.

    Raises:
        OSError: if it cannot be written.
    """
    path = folder() / key.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_suffix(".lock")):
        proof = Proof(key)
        if not afresh:
            with contextlib.suppress(DataError, FileNotFoundError):
                proof = load(path)
        proof.entries |= {entry.name: entry for entry in entries}
        replace_text(path, dump(proof))
    return path


# ---- what holds here -------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What is proved of a device.

    Attributes:
        key: None where there is no such device.
        entries: none where nothing is proved.
        reason: why there are none; and what was ignored, if anything.
    """

    key: Key | None
    entries: Entries = field(default_factory=dict)
    reason: str = ""


_STATES: dict[int, State] = {}
_PRETENDED: list[tuple[Key, ...]] = []
on_unproved: Callable[[State], None] | None = None  # told of a GPU of which nothing is proved, when that is first seen
ignored = False  # by the processes of `fastlm tune` itself


def state(index: int) -> State:
    """What is proved of a device, read once in a process."""
    found = _STATES.get(index)
    if found is None:
        found = _STATES[index] = read_state(device_key(index))
        if not found.entries and found.key is not None and on_unproved is not None:
            on_unproved(found)
    return found


def forget() -> None:
    """Read again what is proved, at the next question."""
    _STATES.clear()


def device_key(index: int) -> Key | None:
    """The key of a GPU by its number; None where there is none."""
    if _PRETENDED:
        keys = _PRETENDED[-1]
        return keys[index] if index < len(keys) else None
    device = properties(index)
    return None if device is None else key_of(device)


@contextlib.contextmanager
def pretend(*keys: Key) -> Iterator[None]:
    """Inside, the GPUs are taken to have these keys, also where there are none: for tests without a GPU."""
    _PRETENDED.append(keys)
    forget()
    try:
        yield
    finally:
        _PRETENDED.pop()
        forget()


def read_state(key: Key | None) -> State:
    """What the proofs say of a key: those of the package, and above them the user's own."""
    if key is None or ignored:
        return State(key, reason=f"unproved: {TUNE}")
    entries: Entries = {}
    problems: list[str] = []
    for proof in shipped():
        if proof.key == key:
            entries |= proof.entries
    try:
        own = folder() / key.file_name
        if own.exists():
            proof = load(own)
            if proof.key != key:
                raise DataError(f"{own}: the key in it is another one")
            entries |= proof.entries
    except DataError as error:
        problems.append(f"the proof is damaged ({error})")
    except OSError as error:
        problems.append(f"the proof cannot be read ({error})")
    if entries or problems:
        return State(key, entries, f"{'; '.join(problems)}: {TUNE} again" if problems else "")
    return State(key, reason=_why_unproved(key))


def first_hint(state: State) -> bool:
    """Whether nobody has been told yet that nothing is proved of this key; remembered in the folder of the proofs.

    Where that cannot be written, nobody is told: else everyone would be, each time.
    """
    if state.key is None:
        return False
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        with open(place / f"{state.key.file_name}.hinted", "x"):
            return True
    except OSError:
        return False


def shipped() -> list[Proof]:
    """The proofs that come with the package."""
    found = []
    for path in reversed(_files(SHIPPED)):
        with contextlib.suppress(DataError, OSError):
            found.append(load(path))
    return found


def _files(of: Path) -> list[Path]:
    """The proofs in a folder, the newest first."""
    try:
        return sorted(of.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []


def _why_unproved(key: Key) -> str:
    """Where there is a proof of this GPU with something else than now: what."""
    for path in _files(folder()):
        with contextlib.suppress(DataError, OSError):
            theirs = load(path).key
            if theirs[:2] == key[:2] and (what := differences(theirs, key)):
                return f"{what}: {TUNE} again"
    return f"unproved: {TUNE}"


def differences(theirs: Key, ours: Key) -> str:
    """What a proof of one key is of, where this one is of another."""
    found = []
    for name, word in FIELDS.items():
        before, now = getattr(theirs, name), getattr(ours, name)
        if before == now:
            continue
        if "kernels" in name:
            found.append(f"the {word} have changed since the proof")
        else:
            named = before if name in ("device", "architecture", "runtime") else f"{word} {before or 'none'}"
            found.append(f"the proof is of {named}, this is {now or 'none'}")
    return "; ".join(found)


# ---- the answer to a request -----------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What is known of a backend for a request.

    Attributes:
        verdict: one of `VERDICTS`, or "" where nothing is known.
        text: the same for people.
        ratio: seconds of what serves otherwise over this backend's, at the nearest measured shape; None without one.
    """

    verdict: str
    text: str
    ratio: float | None = None
    shape: tuple[int, ...] = ()
    other: str = ""


def find(op: str, backend: str, request: Any) -> Finding:
    """What the proofs say of a backend for a request on a GPU."""
    known = state(request.gpu)
    if not known.entries:
        return Finding("", known.reason)
    dtype, features = str(request.dtype)[6:], feature_class(request.features)
    entry = known.entries.get((op, backend, dtype, features))
    if entry is None:
        return Finding("", known.reason or f"unproved for {dtype}, {features}: {TUNE}")
    if entry.verdict != "right":
        again = f" ({entry.command} repeats it)" if entry.command else ""
        return Finding(entry.verdict, f"{entry.verdict} here: {entry.reason}{again}")
    proved = f"proved on this GPU on {entry.date}"
    timed = nearest(entry, request)
    if timed is None:
        return Finding("right", f"{proved}, but not timed with these features")
    ratio, shape, other = timed
    return Finding("right", f"{proved}, {ratio:.2f}x {other} at {shape}", ratio, shape, other)


def nearest(entry: Entry, request: Any) -> tuple[float, tuple[int, ...], str] | None:
    """(how many times as fast as the other backend, the shape, that backend) at the nearest shape that was timed.

    Where gradients are wanted it is both passes that count.
    """
    calls: dict[tuple, dict[str, Timing]] = {}
    for timing in entry.timings:
        calls.setdefault((timing.shape, timing.variant), {})[timing.which] = timing
    wanted = (("full",), ("fwd", "bwd"), ("fwd",)) if request.grad else (("fwd",), ("full",))
    for passes in wanted:
        of_it = [[timed[which] for which in passes] for timed in calls.values() if all(p in timed for p in passes)]
        if of_it:  # of two forms of one shape the one that gains less
            _, ratio, best = min(
                ((_distance(t[0].size, request.size), _ratio(entry.backend, t), t[0]) for t in of_it),
                key=lambda found: found[:2],
            )
            return ratio, best.shape, _other(entry.backend, best)
    return None


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=False))


def _other(backend: str, timing: Timing) -> str:
    return next(name for name in timing.seconds if name != backend)


def _ratio(backend: str, timings: list[Timing]) -> float:
    ours = sum(t.seconds[backend] for t in timings)
    return sum(t.seconds[_other(backend, t)] for t in timings) / ours
