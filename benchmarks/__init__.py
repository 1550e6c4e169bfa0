"""This project measured beside its peers: `python -m benchmarks.run`."""
