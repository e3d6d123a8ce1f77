"""The machine: precision, processes, sharding, CUDA graphs, compilation, timing."""
