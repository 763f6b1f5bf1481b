"""Records under `benchmarks/results` as Markdown tables and figures: one module per record, used by
`benchmarks.report`."""
