"""From pages to tokens: a small crawl is written as JSON lines, cleaned by a recipe, and prepared on two workers.

pip install '.[data]'
python examples/prepare_web.py
"""

import gzip
import json
import tempfile
from pathlib import Path

from fastlm.data import PrepareConfig, load_tokens, prepare

ARTICLE = (
    "<html><body><nav>Home | About</nav><article><h1>Chapter {n}</h1><p>{text}</p></article>"
    "<footer>All rights reserved</footer></body></html>"
)
RECIPE = """
[[step]]
name = "html_page"

[[step]]
name = "whitespace"

[[step]]
name = "length"
min_words = 20

[exact]

[near]
threshold = 0.8
"""


def pages() -> list[str]:
    """Forty pages: ten are too short, and two say the same."""
    texts = [" ".join(f"sentence {k} of page {n}." for k in range(12)) for n in range(30)]
    texts += ["Too short."] * 10
    texts[7] = texts[3]
    return [ARTICLE.format(n=number, text=text) for number, text in enumerate(texts)]


def main() -> None:
    """Prepare and show what came out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with gzip.open(folder / "crawl.jsonl.gz", "wt", encoding="utf-8") as file:
            for number, page in enumerate(pages()):
                file.write(json.dumps({"html": page, "url": f"https://example.org/{number}"}) + "\n")
        (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
        config = PrepareConfig(
            inputs=(folder / "crawl.jsonl.gz",),
            out=folder / "data",
            text_column="html",
            id_column="url",
            recipe=str(folder / "recipe.toml"),
            vocab_size=300,
            workers=2,
        )
        manifest = prepare(config)
        counts = manifest.preparation["documents"]
        print(f"{counts['documents_read']} pages, {counts['documents_cleaned']} kept by the steps")
        for step in counts["steps"]:
            print(f"  {step['name']}: changed {step['changed']}, dropped {step['dropped']}")
        print(f"duplicates: {counts['duplicates']}")
        print(f"{len(load_tokens(config.out, 'train'))} tokens")
        print(*sorted(path.name for path in config.out.iterdir()))


if __name__ == "__main__":
    main()
