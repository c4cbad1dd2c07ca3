"""Pretrain a small BERT on unlabelled text, then teach it to tell good reviews from bad ones.

    python examples/classify_reviews.py [FOLDER]

From a checkout: pip install '.[train,evaluate]', the second for the scores, which are scikit-learn's. It makes its own
sentences, so that it needs no download, and takes about a minute on two cores.
"""

import json
import random
import sys
from pathlib import Path

import torch

import fastlm
from fastlm.data import PrepareConfig, prepare
from fastlm.data.framing import Frame

WORDS = {
    "good": ["lovely", "splendid", "charming", "brilliant", "touching", "witty", "fresh", "moving"],
    "bad": ["dreadful", "boring", "tedious", "clumsy", "stale", "noisy", "hollow", "sloppy"],
}
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": 32, "learning_rate": 3e-3, "eval_interval": 50}


def reviews(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        label = draw.choice(list(WORDS))
        words = draw.choices(WORDS[label], k=3)
        about = draw.choice(["film", "book", "play", "song", "show"])
        yield {"text": f"What a {words[0]} {about}: {words[1]}, {words[2]} and quite long.", "label": label}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    text = write(folder / "text.jsonl", ({"text": row["text"]} for row in reviews(3000, 0)))
    table = write(folder / "reviews.jsonl", reviews(200, 1))

    prepare(PrepareConfig(inputs=(text,), out=folder / "text", tokenizer="wordpiece", vocab_size=300, special="masked",
                          overwrite=True))  # fmt: skip
    fastlm.train(folder / "text", out=folder / "pretrained", objective="masked", max_steps=150, overwrite=True, **SIZES)

    result = fastlm.train(
        table,
        out=folder / "classifier",
        objective="classification",
        init=folder / "pretrained",
        new_head=True,
        classification={"label_smoothing": 0.05},
        export=folder / "huggingface",
        max_steps=100,
        overwrite=True,
        on_evaluation=lambda step, numbers, best: print(f"step {step}: {numbers.describe()}{' *' if best else ''}"),
        **SIZES,
    )
    print(f"accuracy {result.best:.3f} on held-out rows")

    model, tokenizer = fastlm.load_with_tokenizer(folder / "huggingface")
    frame = Frame(tokenizer, model.config.context_length)
    (ids,) = tokenizer.encode_arrays(["What a witty book: fresh, moving and quite long."])
    logits = model(torch.from_numpy(frame(ids).tokens)[None])
    print("a witty book is", model.config.labels[logits.argmax()])
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/classify_reviews"))
