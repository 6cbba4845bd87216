"""Benchmarks of torch_fp4ops: ``python benchmarks/run.py --help``; how the figures are made is in PROTOCOL.md."""
