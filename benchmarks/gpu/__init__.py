"""Every GPU path on one machine with one GPU: checked and measured, step by step; started by ``benchmarks/gpu.sh``."""
