"""The experiment ``lengths``: one network for any number of steps. Imports the package."""

from __future__ import annotations

from typing import Any

from dxmi_ext.reproduce.densities import COOLED, variant
from dxmi_ext.reproduce.experiments import Experiment, Row

_SEVERAL = (2, 4, 5, 10)
_UNTRAINED = (3, 7)


def _any_length(recipe: str = "8gaussians") -> Row:
    settings: dict[str, Any] = {"lengths": ",".join(map(str, _SEVERAL)), "step_input": "levels"}
    settings |= {"random_spacing": 0.25, "untrained_lengths": ",".join(map(str, _UNTRAINED))}
    settings |= {"iterations": 10_000, "batch_size": 256, "sampler_lr": 1e-3}
    settings |= {"td_lambda": 0.9, "expected_cost": True}
    label = "one network that sees noise levels, trained with 2, 4, 5 and 10 steps"
    return _of_lengths("levels", label, recipe, **settings)


def _one_length(steps: int, recipe: str = "8gaussians") -> Row:
    return _of_lengths(f"t{steps}", f"one network for T = {steps}", recipe, steps=steps, lengths=str(steps))


def _of_lengths(name: str, label: str, recipe: str = "8gaussians", **settings: Any) -> Row:
    if recipe != "8gaussians":
        name, label = f"{recipe}-{name}", f"{recipe}, {label}"
    return variant(name, label, recipe, **settings, **COOLED)


LENGTHS = Experiment(
    "lengths",
    "One network for any number of steps",
    [
        _any_length(),
        _of_lengths("any", "one network with a table row per step", lengths="1,2,4,5,10"),
        *(_one_length(steps) for steps in (1, 2, 3, 4, 5, 7, 10)),
        *(
            row
            for recipe in ("2spirals", "checkerboard")
            for row in (_any_length(recipe), *(_one_length(steps, recipe) for steps in _SEVERAL))
        ),
    ],
    columns={f"sliced_wasserstein_t{t}": f"SW, T = {t}" for t in (1, 2, 3, 4, 5, 7, 10)} | {"auroc": "AUROC"},
    notes="""\
SW and AUROC as in `table1`, on the 8 Gaussians unless noted. Networks that see noise levels
(`step_input=levels`) are never trained with T = 3 and 7. They have 10,000 iterations with batches of 256,
twice the sampler's learning rate, `td_lambda=.9` and `expected_cost=true`, a quarter of the iterations with
chains of random levels, and AUROC is that of the energy for T = 5. All other rows have 5,000 iterations with
batches of 128. The network with a table row per step is trained with T = 1, 2, 4, 5 and 10, each in a fifth
of the iterations. In all rows, tau is .1 for 70 % of the run and then falls to a quarter, as in
`temperature`.""",
    seeds=3,
)
