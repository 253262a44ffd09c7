"""From a trained run to a file that decides the same everywhere (installed as ``meliad_edge.export``)."""
