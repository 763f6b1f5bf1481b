"""Reading, watching, comparing and drawing training runs, of any trainer of transformers or TRL, by the logs they wrote."""
