"""Reading images: layouts on disk, decoding, and data sets."""
