"""What a run shows: its log, plots, samples and the terminal."""
