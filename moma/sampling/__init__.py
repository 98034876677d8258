"""The engine: noise, batches, solver, guidance, CUDA graphs, decoding. It knows no method."""
