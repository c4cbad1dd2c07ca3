"""Chinese in both scripts to one, cleaned and tokenized for a masked objective, and the tokens of each word.

pip install '.[data]'
python examples/prepare_chinese.py
"""

import csv
import tempfile
from pathlib import Path

import numpy as np

from fastlm.data import PrepareConfig, Tokenizer, load_tokens, prepare
from fastlm.data.words import word_ids

SENTENCES = [
    "我与父亲不相见已二年余了，我最不能忘记的是他的背影。",
    "那年冬天，祖母死了，父親的差使也交卸了，正是禍不單行的日子。",
    "我从北京到徐州，打算跟着父亲奔丧回家。",
    "希望本是無所謂有，無所謂無的。這正如地上的路；其實地上本沒有路，走的人多了，也便成了路。",
]
RECIPE = """
[[step]]
name = "fix_unicode"

[[step]]
name = "chinese_script"
conversion = "t2s"

[[step]]
name = "length"
min_words = 5
chinese = "jieba"

[[step]]
name = "personal_data"
"""


def main() -> None:
    """Prepare, and show whole words of what came out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "sentences.tsv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            table.writerow(["text", "label"])
            for number in range(60):
                table.writerow([f"第{number}句：{SENTENCES[number % len(SENTENCES)]}", number % 2])
        (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
        config = PrepareConfig(
            inputs=(folder / "sentences.tsv",),
            out=folder / "data",
            meta_columns=("label",),
            recipe=str(folder / "recipe.toml"),
            tokenizer="wordpiece",
            special="masked",
            vocab_size=500,
            split="documents",
        )
        counts = prepare(config).preparation["documents"]
        print(f"{counts['documents_cleaned']} of {counts['documents_read']} sentences kept")
        tokenizer = Tokenizer.load(config.out)
        ids = np.asarray(load_tokens(config.out, "train")[:64])
        numbers = word_ids(tokenizer, ids, segmenter="jieba")
        words = [tokenizer.decode(ids[numbers == word]).replace(" ", "") for word in range(numbers.max() + 1)]
        print("words:", *words)


if __name__ == "__main__":
    main()
