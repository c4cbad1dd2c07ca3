"""Files of tokenizers of other makers, read as a definition for the `tokenizers` library."""
