"""Which tokens make a word, for those objectives that take words whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...data import Tokenizer
from ...data.framing import special_token_ids
from ...errors import ConfigError

try:
    from ...data.words import word_ids
except ModuleNotFoundError:

    def word_ids(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, segmenter: str) -> np.ndarray:
        """The number of each token's word, (tokens,) int64, from 0 on; -1 for special tokens.

        A token continues the word before it if WordPiece writes it so (`##`), or, where words carry a mark at their
        beginning (byte-level BPE, SentencePiece), if it has none.
        """
        if segmenter != "none":
            raise ConfigError(f"segmenter={segmenter!r}, expected none")
        special = set(special_token_ids(tokenizer).tolist())
        names = [tokenizer._backend.id_to_token(int(token)) or "" for token in ids]
        wordpiece = '"WordPiece"' in tokenizer._definition.decode()
        numbers, word, inside = np.full(len(names), -1, np.int64), -1, False
        for place, (token, name) in enumerate(zip(ids, names, strict=True)):
            if int(token) in special:
                inside = False
                continue
            goes_on = name.startswith("##") if wordpiece else not name.startswith(("Ġ", "▁", "Ċ"))
            word += not (inside and goes_on)
            numbers[place], inside = word, True
        return numbers


__all__ = ["word_ids"]
