"""Data of the recipes, every row a function of the noise key and its global index."""
