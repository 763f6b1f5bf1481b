"""Benchmarks with verifiable answers: problems, completions, grades, and scores with intervals."""
