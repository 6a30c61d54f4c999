"""Networks for samplers and values."""
