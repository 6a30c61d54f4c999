"""The task of 2D densities: recipes, data, networks, metrics and plots."""
