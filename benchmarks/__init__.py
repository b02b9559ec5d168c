"""Programs that measure a node beside its peers, in one run: ``python -m benchmarks.NAME --help``."""
