"""Times of `wpo_notes` beside other libraries: ``python -m benchmarks``."""
