# %% [markdown]
# # Anomaly detection on your own folders
#
# You need one folder of good images. Folders of defective ones beside it are only used for testing. This
# tutorial makes such folders first; with your own, set `parts` to their path. It requires the extra
# `images`: `pip install '.[images]'`.

# %%
import csv
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dxmi_ext import cli

short = bool(os.environ.get("DXMI_SHORT"))
parts, new = Path("parts"), Path("new-pictures")
rng = np.random.default_rng(0)


def washer(scratched: bool) -> Image.Image:
    """A gray ring of 96 x 96 pixels at a random place, with noise; scratched: a dark line across it."""
    y, x = np.mgrid[:96, :96] - 48 + rng.uniform(-3, 3, (2, 1, 1))
    radius = np.hypot(x, y)
    picture = np.where((radius > 16) & (radius < 36), 190.0, 90.0) + rng.normal(0, 6, (96, 96))
    if scratched:
        turn = rng.uniform(0, np.pi)
        across, along = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        picture[(np.abs(across) < 1.5) & (along > 14) & (along < 38)] = 40
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


for folder, count, scratched in (
    (parts / "good", 12 if short else 200, False),
    (parts / "scratched", 4 if short else 40, True),
    (new, 4, False),
    (new, 4, True),
):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        washer(scratched).save(folder / f"{'scratched' if scratched else 'good'}{i:03}.png")

# %% [markdown]
# ## What would be read
#
# `cli.main` runs a command of `dxmi`; the same lines work in a shell, as `dxmi data parts`.

# %%
cli.main(["data", str(parts)])

# %% [markdown]
# ## Training
#
# The run learns from good images alone. It trains DxMI's energy on features of a small pretrained network
# that is part of the extra, fits plain detectors beside it, and chooses the simplest that does best on
# synthetic defects. The table compares all of them on your defective images.

# %%
quick = ["iterations=2", "pretrain_iterations=2", "size=64", "detector=gaussian", "preparation=unit"]
fewer = [*quick, "baselines=none"] if short else []
cli.main(["train", "anomaly", f"data={parts}", "output=runs/parts", *fewer])

# %% [markdown]
# ## Scoring new images
#
# `runs/parts/scores` gets `scores.csv`, a heat map of each image, and `index.html`, a page of cards sorted by
# score. A score above the threshold is rare for good images: at most 1 in 100, if at least 99 were held out.

# %%
cli.main(["score", "runs/parts", str(new)])
with open("runs/parts/scores/scores.csv", encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
        print(" ".join(f"{key}={value}" for key, value in row.items()))
