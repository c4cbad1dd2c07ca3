"""Two prepared corpora as one: mixed by weights, the documents packed into windows of whole ones.

pip install '.[data]'
python examples/pack_and_mix.py
"""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from fastlm.data import PrepareConfig, Tokenizer, load_manifest, load_tokens, prepare
from fastlm.data.mixing import Mixture
from fastlm.data.packing import PackedWindows
from fastlm.data.windows import ShiftedWindows

LENGTH = 64


def corpus(folder: Path, name: str, word: str, documents: int, tokenizer: str) -> Path:
    """Prepare documents of one word, a line each; the validation ones are chosen by the hash of their text."""
    lines = [" ".join([f"{word}{number}"] * (1 + number % 20)) for number in range(documents)]
    (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    out = folder / name
    prepare(PrepareConfig((folder / f"{name}.txt",), out, tokenizer, document_separator=r"\n", val_fraction=0.1))
    return out


def main() -> None:
    """Prepare, pack and mix."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer.json"
        Tokenizer.train_bpe(["apple pear 0123456789"] * 3, 300).save(tokenizer)
        outs = [corpus(folder, kind, kind, count, str(tokenizer)) for kind, count in (("apple", 300), ("pear", 900))]
        for out in outs:
            tokens, end = load_tokens(out, "train"), load_manifest(out).eot_id
            assert end is not None
            windows = PackedWindows(tokens, LENGTH, end)
            full = (len(tokens) - 1) / (LENGTH * len(windows))
            print(f"{out.name}: {len(tokens)} tokens in {len(windows)} packed windows, {full:.1%} full")
            print(f"  documents of the first: {windows[0].lengths.tolist()}")
        mixed = Mixture([ShiftedWindows(load_tokens(out, "train"), LENGTH) for out in outs], weights=[3, 1])
        epoch = mixed.epoch(np.random.default_rng([0, 1]))  # the seed and the epoch's number
        words = Tokenizer.load(tokenizer)
        seen = Counter("apple" if "apple" in words.decode(epoch[index]) else "pear" for index in range(len(epoch)))
        print(f"an epoch of {len(mixed)} windows, mixed 3 to 1: {dict(seen)}")


if __name__ == "__main__":
    main()
