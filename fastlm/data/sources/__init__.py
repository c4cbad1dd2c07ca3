"""Files of many formats as a stream of documents: found, opened, read row by row.

A reader gives for each row a `Document`, or a `Bad` that says what is wrong with it; nothing of a file's content makes
it raise. Memory: a reader holds a few rows at a time, and refuses a document of more than `SourceOptions.max_bytes`.
"""

from .base import Bad, SourceOptions
from .find import FORMATS, File, find
from .read import read_file
from .units import Span, Unit, cut

__all__ = ["FORMATS", "Bad", "File", "SourceOptions", "Span", "Unit", "cut", "find", "read_file"]
