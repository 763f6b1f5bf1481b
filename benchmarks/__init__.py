"""Commands that measure what the documentation claims; each prints a table and writes its raw numbers as JSON."""
