"""How good samples and energies are; used by recipes and by ``dxmi evaluate``."""
