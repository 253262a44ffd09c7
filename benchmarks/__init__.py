"""Latency and accuracy harness (installed as ``meliad_edge.benchmarks``)."""
