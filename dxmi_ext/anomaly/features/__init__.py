"""Features of frozen backbones, and their preparation for detectors."""
