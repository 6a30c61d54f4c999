"""What trains networks: optimizers, learning rates, moving averages and iterations."""
