"""Scripts of the project: what measures, proves, trains and writes pages. Run as `python -m tools.bench.compile`."""
