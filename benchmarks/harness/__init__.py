"""What the benchmarks share: the authors' side, timing, the check of results, tables."""
