"""Jobs of every kind under faults: ``python -m benchmarks.runtime.chaos --help``."""
