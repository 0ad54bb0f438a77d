"""Times of `wpo_notes` beside other ways to the same numbers: ``python -m benchmarks``."""
