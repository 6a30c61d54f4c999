"""What the experiments on 2D densities share: numbers, notes and a row. Imports ``reproduce.experiments``."""

from __future__ import annotations

from typing import Any

from dxmi_ext.reproduce.experiments import COLUMNS, Row

SPREAD_COLUMNS = COLUMNS | {"entropy_excess": "entropy", "coverage": "coverage"}

SCORES = """\
SW: sliced 2-Wasserstein distance of samples to data (10,000 each, 1,000 projections), mean of five samplings.
AUROC: of the energy, data against uniform points on [-4, 4]^2; the true density of the 8 Gaussians has .902,
of 2spirals .924, of the checkerboard .750.
KL: KL(data || exp(-E / w) / Z) in nats, by quadrature over that square. w is the weight of the entropy when
the run ends, tau / 2 where costs are means over the two dimensions; without entropy there is no such
density."""

SPREADS = """\
entropy: that of samples less that of data, in nats. coverage: share of data that have a sample nearer than
their fifth neighbor in the data; fresh data have .969."""


def variant(name: str, label: str, recipe: str = "8gaussians", **settings: Any) -> Row:
    return Row(name, label, settings, recipe=recipe)
