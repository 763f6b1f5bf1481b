"""Records under `benchmarks/results` as Markdown tables and figures: a module per kind of record, used by
`benchmarks.report`."""
