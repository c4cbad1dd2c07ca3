"""Duplicates and contamination of a corpus, in bounded memory and with one result for any number of processes.

Documents are known by their numbers in the corpus, from 0 on, in the order of its shards.

Equal and nearly equal documents: each shard by itself, then once over all, then each document by its reason.

    exact, near = ExactOptions(), NearOptions(threshold=0.8)       either may be None
    save(file, signatures(texts, exact, near))                     of each shard, in any process
    texts = Shards(read, counts)                                   read(shard) gives its texts again
    reasons, counts = resolve(files, texts, exact, near, folder=work, pairs=opened)
    if reasons[number]: Dropped(REASONS[reasons[number]])

`fingerprint(exact, near)` belongs to the key of what is kept of `signatures`: other libraries may hash otherwise.

Lines or paragraphs that occur too often:

    options = LineOptions("line", most=10)
    save(file, line_hashes(texts, options))                        of each shard, in any process
    repeated_lines(files, counts, options, path)                   once
    lines = LineFilter(path, options)                              in each process
    text = lines.filter(number, text)                              None: Dropped(REPEATED_LINES)

Text of evaluation sets, a `Step` (and `find` for many texts at once):

    step = Contamination((name, text) for each evaluation text)    Dropped(CONTAMINATED)
"""

from .contamination import CONTAMINATED, Contamination, ContaminationOptions, Match
from .lines import REPEATED_LINES, LineFilter, LineOptions, line_hashes, repeated_lines
from .resolving import REASONS, Resolution, Shards, resolve
from .signing import ExactOptions, NearOptions, Texts, bands, collision_probability, fingerprint, signatures
from .stored import save

__all__ = [
    "CONTAMINATED",
    "REASONS",
    "REPEATED_LINES",
    "Contamination",
    "ContaminationOptions",
    "ExactOptions",
    "LineFilter",
    "LineOptions",
    "Match",
    "NearOptions",
    "Resolution",
    "Shards",
    "Texts",
    "bands",
    "collision_probability",
    "fingerprint",
    "line_hashes",
    "repeated_lines",
    "resolve",
    "save",
    "signatures",
]
