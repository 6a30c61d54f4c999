"""What the experiments on 2D densities share: columns, notes and a kind of row."""

from __future__ import annotations

from typing import Any

from dxmi_ext.reproduce.experiments import COLUMNS, Row

COOLED: dict[str, Any] = {"tau": 0.1, "tau_hold": 0.7, "tau_cooling": 0.25}
"""A tau that falls to a quarter in the last 30 % of a run."""

SPREAD_COLUMNS = COLUMNS | {"entropy_excess": "entropy", "coverage": "coverage"}

SCORES = """\
SW: sliced 2-Wasserstein distance between samples and data (10,000 each, 1,000 projections), mean over five
samplings.
AUROC: data against uniform points on [-4, 4]^2, ranked by the energy. The true density has .902 on the 8
Gaussians, .924 on 2spirals and .750 on the checkerboard.
KL: KL(data || exp(-E / w) / Z) in nats, by quadrature over the same square. w is the weight of the entropy at
the end of the run, which is tau / 2 if costs are means over the two dimensions. Without entropy there is no
such density."""

SPREADS = """\
entropy: entropy of the samples minus that of the data, in nats. coverage: share of data points with a sample
closer than their fifth nearest neighbor in the data; fresh data have .969."""


def variant(name: str, label: str, recipe: str = "8gaussians", **settings: Any) -> Row:
    """A row with some settings changed."""
    return Row(name, label, settings, recipe=recipe)
