"""Benchmark cases, one file an op."""
