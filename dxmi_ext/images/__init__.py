"""The task of images: recipes, reading images, networks, metrics and exchange with diffusers."""
