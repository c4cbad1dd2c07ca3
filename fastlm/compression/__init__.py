"""Models made smaller: quantized weights."""
