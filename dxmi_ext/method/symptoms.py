"""Problems of a DxMI run that its metrics show, by name. Imports the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ENERGY_LIMIT = 1e3  # gamma = 1 keeps mean energies within about 1
ENERGY_SPREAD = 1e-6
SPREADS = 0.1, 10.0  # spread of samples over spread of data
STDS = 0.01, 100.0  # sigma over initial sigma


def of(numbers: Mapping[str, Any], initial_std: Sequence[float]) -> dict[str, str]:
    """Problems that an iteration's metrics show: name -> the numbers that show it.

    Args:
        numbers: energy_data, energy_sample, energy_spread, data_spread, sample_spread and, for a sampler,
            std [T]; spreads are standard deviations over rows.
        initial_std: sigma [T] at the start of the run; empty without a sampler.
    """
    data, sample = numbers["energy_data"], numbers["energy_sample"]
    # The data of a single row have no spread.
    spread = numbers["sample_spread"] / numbers["data_spread"] if numbers["data_spread"] else 1.0
    pairs = zip(numbers.get("std", ()), initial_std, strict=True)
    ratios = [now / before for now, before in pairs] or [1.0]
    energies, spreads = f"data {data:.3g}, samples {sample:.3g}", f"{spread:.3g} of the data's spread"
    stds = f"{min(ratios):.3g} to {max(ratios):.3g} times its initial value"
    found = {  # every condition is false for NaN
        "energy blow-up": (max(abs(data), abs(sample)) > ENERGY_LIMIT, energies),
        "energy collapse": (numbers["energy_spread"] < ENERGY_SPREAD, f"equal for all rows: {energies}"),
        "sample blow-up": (spread > SPREADS[1], spreads),
        "sample collapse": (spread < SPREADS[0], spreads),
        "sigma blow-up": (max(ratios) > STDS[1], stds),
        "sigma collapse": (min(ratios) < STDS[0], stds),
    }
    return {name: why for name, (is_so, why) in found.items() if is_so}
