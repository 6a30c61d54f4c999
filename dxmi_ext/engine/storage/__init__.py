"""Files and folders that are complete or absent, what may be overwritten, checkpoints and csv tables."""
