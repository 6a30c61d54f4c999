"""Where and how networks run: devices, ranks, sharding, precision and CUDA graphs."""
