"""Benchmarks with verifiable answers: what to ask, who answers, whether it is right, and how sure one can be of the score."""
