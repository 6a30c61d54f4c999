"""Networks of images: samplers, energies, and exchange with diffusers and published checkpoints."""
