"""How each record under `benchmarks/results` reads in the README: one module per record, used by `benchmarks.report`."""
