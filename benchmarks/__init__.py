"""Measurements, each a module to run: `python -m benchmarks.NAME [--json FILE] [--quick]`. Results say commit, machine and versions."""
