"""Scores of images by a trained detector: the scorer, its threshold, and the command ``score``."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import cli, tasks
from dxmi_ext.anomaly.data import dataset as anomaly
from dxmi_ext.anomaly.features import backbones
from dxmi_ext.anomaly.scores import inspected, page, plots, score_files, scoring
from dxmi_ext.anomaly.scores.page import Place, Shown, Worst
from dxmi_ext.anomaly.scores.scoring import ScoreError, Scorer, TooFew, threshold_of
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data.pixels import Scale
from dxmi_ext.images.metrics.features import Extractor, FeatureError

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SIZE, GRID = 8, 4
ABOUT = scoring.about({"held_out": 10.0, "false_alarms_low": 0.0025, "false_alarms_high": 0.3085})


class Brightness(nn.Module):
    """x [N, 3] -> 10 times the mean [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x.mean(1)


def scorer(**options: object) -> Scorer:
    """A scorer with positions of 2 x 2 pixels: 10 where an image is white, 0 where it is black."""
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "normalize": False}
    backbone = backbones.backbone(nn.Identity(), "pixels", size=SIZE, grid=GRID, **plain)  # type: ignore[arg-type]
    given = {"threshold": 6.0, "pixel_threshold": 4.0, "about_threshold": ABOUT} | options
    return Scorer(backbone, Brightness(), **given)  # type: ignore[arg-type]


def brightness_of(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 3, SIZE, SIZE] -> the maps expected from `scorer`, float64 [n, GRID, GRID]."""
    means = images.reshape(len(images), 3, GRID, 2, GRID, 2).mean(axis=(1, 3, 5))
    return 10 * means / 255


# --- the scorer --------------------------------------------------------------------------------------


def test_a_score_is_the_largest_energy_or_a_mean_of_the_largest() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, SIZE, SIZE), np.uint8)
    expected = brightness_of(images)
    detector = scorer()
    maps = detector.maps(torch.from_numpy(images))
    assert maps.shape == (5, GRID, GRID) and maps.dtype == torch.float32 and not maps.requires_grad
    np.testing.assert_allclose(maps, expected, rtol=1e-5)
    np.testing.assert_allclose(detector.scores(maps), expected.max(axis=(1, 2)), rtol=1e-5)
    largest = np.sort(expected.reshape(5, -1))[:, ::-1]
    for share, count in ((0.01, 1), (0.25, 4), (1.0, 16)):
        scores = scorer(top_share=share).scores(maps)
        np.testing.assert_allclose(scores, largest[:, :count].mean(axis=1), rtol=1e-5)
    assert len(scorer().maps(torch.from_numpy(images[:0]))) == 0


def test_bad_scorers_and_images_are_rejected() -> None:
    for bad in ({"threshold": float("nan")}, {"pixel_threshold": 0.0}, {"top_share": 1.5}):
        with pytest.raises(
            ScoreError, match=r"threshold must be finite, pixel_threshold > 0 and top_share from 0"
        ):
            scorer(**bad)
    with pytest.raises(ScoreError, match="size must be given, as backbone plain has none"):
        Scorer(Extractor(nn.Identity(), "plain"), Brightness(), threshold=1.0, pixel_threshold=1.0)
    with pytest.raises(FeatureError, match=r"images must be uint8 .*got torch.float32 \[1, 3, 8, 8\]"):
        scorer().maps(torch.zeros(1, 3, SIZE, SIZE))


@pytest.mark.parametrize(("n", "quantile", "rank"), [(19, 0.95, 19), (9, 0.8, 8), (10, 0.8, 9), (1, 0.3, 1)])
def test_good_images_exceed_the_threshold_at_most_as_often_as_its_quantile_says(
    n: int, quantile: float, rank: int
) -> None:
    scores = torch.randperm(n + 1, generator=torch.Generator().manual_seed(0)).float()
    below = 0
    for i in range(n + 1):  # each in turn is the new one, since all orders are equally likely
        others = torch.cat((scores[:i], scores[i + 1 :]))
        threshold = threshold_of(others, quantile)
        assert threshold == float(others.sort().values[rank - 1])
        below += bool(scores[i] <= threshold)
    assert below / (n + 1) >= quantile


@pytest.mark.parametrize(("n", "rank"), [(10, 10), (99, 98), (200, 199), (40, 20)])
def test_the_interval_of_false_alarms_is_that_of_clopper_and_pearson(n: int, rank: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.beta.ppf((0.025, 0.975), n + 1 - rank, rank)
    assert scoring.false_alarm_interval(n, rank) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match=f"rank must be from 1 to n={n}, got {n + 1}"):
        scoring.false_alarm_interval(n, n + 1)


def test_the_interval_covers_the_share_of_good_scores_above_the_threshold() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        above = 1 - np.sort(random.random(67))[-3]  # for uniform scores
        low, high = scoring.false_alarm_interval(67, 65)
        covered += low <= above <= high
    assert 0.93 < covered / 1000 < 0.97


def test_too_few_good_images_have_no_threshold() -> None:
    for n, quantile, least in ((18, 0.95, 19), (98, 0.99, 99), (0, 0.5, 1)):
        with pytest.raises(TooFew, match=f"requires at least {least} held-out scores, got {n}"):
            threshold_of(torch.arange(n), quantile)
        assert threshold_of(np.arange(least), quantile) == least - 1
    with pytest.raises(TooFew, match="quantile=1 requires at least infinitely many held-out scores, got 5"):
        threshold_of(torch.arange(5), 1)
    with pytest.raises(ScoreError, match=r"quantile must be from 0 to 1, got 1\.5"):
        threshold_of(torch.arange(5), 1.5)
    assert threshold_of(torch.arange(5), 0) == 0
    with pytest.raises(ScoreError, match="scores: 1 of 2 are not finite"):
        threshold_of(torch.tensor([1.0, torch.nan]), 0.5)


# --- heat maps ---------------------------------------------------------------------------------------


def test_heat_maps_show_scores_and_outline_those_above_the_threshold() -> None:
    gray = np.full((40, 40, 3), 100, np.uint8)
    scores = np.zeros((40, 40), np.float32)
    scores[10:20, 10:20] = 1.0
    plain = plots.heat_map(gray, scores, 1.0)  # at the threshold, not above it
    assert (plain[:10] == 100).all() and len(np.unique(plain.reshape(-1, 3), axis=0)) == 2
    scores[30:, 30:] = 50.0
    marked = plots.heat_map(gray, scores, 1.0)
    assert np.array_equal(marked[10:20, 10:20], plain[10:20, 10:20])
    last = np.array(plots.heat_colors(2)[1])
    assert np.abs(marked[35, 35] - (0.8 * last + 0.2 * 100)).max() <= 0.5
    line = (marked == plots._CONTOUR).all(axis=2)
    assert line.sum() == 21 and line[29, 29:].all() and line[29:, 29].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_heat_maps_of_a_diverging_energy_are_drawn(value: float, tmp_path: Path) -> None:
    heat = torch.ones(2, 8, 8)
    heat[0, :4], heat[1] = value, value
    plots.heatmaps(tmp_path / "heat.png", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), heat, None)
    assert (tmp_path / "heat.png").is_file()


# --- the command -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are nested, and collects alternative texts of images, links, cards and the text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.pictures, self.text = list[str](), list[str](), ""
        self.links, self.cards = list[str](), list[dict[str, str | None]]()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            assert (given["src"] or "").startswith("data:image/jpeg;base64,")
            assert given["loading"] == "lazy"
            self.pictures.append(given["alt"] or "")
        if tag == "a":
            self.links.append(urllib.parse.unquote(given["href"] or ""))
        if tag == "article":
            self.cards.append(given)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def gray(value: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose scorer is the one above."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").touch()
    task = SimpleNamespace(load_scorer=lambda directory, device: scorer().to(device))
    monkeypatch.setattr(tasks, "task_of", lambda _: task)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images in folders with scores 2, 4, 8 and 10, a damaged one and a hidden one."""
    root = tmp_path / "pictures"
    for name, value, shape in (
        ("a/x.png", 51, (30, 20)),
        ("b/x.png", 204, (SIZE, SIZE)),
        ("b/<i>&'\"é.jpg", 255, (700, 1300)),
        ("x.webp", 102, (9, 5)),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gray(value, *shape)).save(root / name)
    (root / "b/broken.png").write_bytes((root / "b/x.png").read_bytes()[:-30])
    (root / "a/.x.png").touch()
    (root / "a/notes.txt").touch()
    (root / "loop.png").symlink_to("loop.png")
    return root


def table(folder: Path, name: str = "scores.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_a_folder_becomes_a_table_heat_maps_and_a_page(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", str(run), str(pictures), "batch_size=2", "device=cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "dxmi score: 1 of 5 images have no score; scores.csv has the reasons"
    )
    expected = (
        "2 of 5 images are anomalous (score above 6). 0.2 % to 30.9 % of new good data will score above the "
        "threshold (95 % confidence interval from 10 held-out scores)."
    )
    assert expected in captured.out
    assert "ms per image" in captured.out and "score: 5/5" in captured.err
    folder = run / "scores"
    assert {path.name for path in folder.iterdir()} == {"dxmi.json", "scores.csv", "heatmaps", "index.html"}
    rows = {row["path"].removeprefix(f"{pictures}/"): row for row in table(folder)}
    assert tuple(rows["x.webp"]) == score_files.COLUMNS
    found = {
        name: (row["score"] and round(float(row["score"]), 1), row["anomalous"]) for name, row in rows.items()
    }
    assert found == {
        "a/x.png": (2.0, "0"), "x.webp": (4.0, "0"), "b/x.png": (8.0, "1"), "b/<i>&'\"é.jpg": (10.0, "1"),
        "b/broken.png": ("", ""),
    }  # fmt: skip
    assert rows["b/broken.png"]["error"].startswith("cannot be decoded (")
    good = [row for row in rows.values() if not row["error"]]
    assert {row["threshold"] for row in good} == {"6.0"}
    sizes = {row["path"]: Image.open(folder / row["heatmap"]).size for row in good}
    assert len({row["heatmap"] for row in good}) == 4 == len(list((folder / "heatmaps").iterdir()))
    assert sizes[f"{pictures}/a/x.png"] == (20, 30) and sizes[f"{pictures}/b/<i>&'\"é.jpg"] == (512, 276)

    page = Page(folder / "index.html")
    assert expected in page.text
    worst = ["b/<i>&'\"é.jpg", "b/x.png", "x.webp", "a/x.png"]
    assert page.pictures[::2] == worst and f"Paths are relative to {pictures}." in page.text
    assert page.pictures[1::2] == [f"heat map of {name}" for name in worst]
    assert page.text.count("anomalous, score") == 2 == page.text.count("good, score")
    assert [card["data-class"] for card in page.cards] == ["b", "b", pictures.name, "a"]
    by_path = {row["path"]: row["heatmap"] for row in good}
    assert page.links == [*(by_path[f"{pictures}/{name}"] for name in worst), "scores.csv"]
    assert "Without a score: 1" in page.text and "broken.png: cannot be decoded" in page.text


def test_settings_may_be_given_between_images(run: Path, pictures: Path, tmp_path: Path) -> None:
    a, white, output = pictures / "a", pictures / "b/<i>&'\"é.jpg", tmp_path / "elsewhere/scores"
    given = ["threshold=10", a / "x.png", "worst=1", white, a, "heatmaps=false", f"output={output}"]
    assert cli.main(["score", str(run), *map(str, given), "device=cpu"]) == 0
    assert {path.name for path in output.iterdir()} == {"dxmi.json", "scores.csv", "index.html"}
    rows = table(output)
    assert [row["path"] for row in rows] == [f"{a}/x.png", str(white)]  # each once
    assert rows[1]["score"] == "10" and rows[1]["threshold"] == "10.0"
    assert [row["anomalous"] for row in rows] == ["0", "0"]  # at the threshold is not above it
    assert Page(output / "index.html").pictures == [white.name, f"heat map of {white.name}"]
    assert ABOUT not in Page(output / "index.html").text  # the sentence is about the run's own threshold


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_cards_are_sorted_and_filtered_in_a_browser(tmp_path: Path) -> None:
    places = [Place(f"{name}/{i}.png", 9 - i, i, i < 2) for i, name in enumerate("bcab")]
    text = page.html_of("4 pictures.", [Shown(p, (8, 8), b"", b"") for p in places], {}, heat_maps=False)
    script = """<script>
    const state = () => [...document.querySelectorAll('article')].filter(c => !c.hidden)
      .map(c => c.dataset.name).join(' ') + ' ' + document.getElementById('cards').className;
    const click = on => { document.querySelector(`[data-${on}]`).click(); return state(); };
    document.title = [state(), click('sort=score'), click('sort=class'), click('show=good'),
      click('show=sides'), click('sort=name')].join('|');
    </script>"""
    (tmp_path / "page.html").write_text(text + script)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *flags, "--dump-dom", str(tmp_path / "page.html")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    title = found.partition("<title>")[2].partition("</title>")[0]
    assert [state.split() for state in title.split("|")] == [
        ["b/0.png", "c/1.png", "a/2.png", "b/3.png"],
        ["b/3.png", "a/2.png", "c/1.png", "b/0.png"],
        ["a/2.png", "b/0.png", "b/3.png", "c/1.png"],
        ["a/2.png", "b/3.png"],
        ["a/2.png", "b/0.png", "b/3.png", "c/1.png", "sides"],
        ["a/2.png", "b/0.png", "b/3.png", "c/1.png", "sides"],
    ]


@pytest.mark.parametrize("n", [1, 3, 20])
def test_the_worst_are_the_first_of_all_sorted(n: int) -> None:
    scores, worst = np.random.default_rng(0).integers(0, 6, 15).tolist(), Worst(n)
    for row, score in enumerate(scores):
        place = Place("", score, row, False)
        shown = Shown(place, (1, 1), b"", b"")
        if worst.has_room_for(score):
            worst.add(shown)
    expected = sorted(range(15), key=lambda row: (-scores[row], row))[:n]
    assert [shown.place.row for shown in worst.sorted()] == expected


def test_two_scorings_do_not_share_a_folder(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "scores").mkdir()
    with files.lock(run / "scores/.lock"):
        assert cli.main(["score", str(run), str(pictures / "b/x.png"), "device=cpu"]) == 2
    assert "another process is at work in this folder" in capsys.readouterr().err
    assert not [*(run / "scores").iterdir()]


def test_another_scoring_replaces_the_first(run: Path, pictures: Path) -> None:
    assert cli.main(["score", str(run), str(pictures / "a"), "device=cpu"]) == 0
    stray, other = run / "scores/heatmaps/000007-stray.png", run / "scores/heatmaps/holiday.png"
    stray.touch()
    other.touch()
    assert cli.main(["score", str(run), str(run / "scores"), str(pictures / "b/x.png"), "worst=0"]) == 2
    assert stray.exists()  # refused before anything is removed
    assert cli.main(["score", str(run), str(pictures / "a/notes.txt")]) == 2
    assert stray.exists()
    assert cli.main(["score", str(run), str(pictures / "b/x.png"), "worst=0", "device=cpu"]) == 0
    assert not stray.exists() and other.exists() and len(table(run / "scores")) == 1
    assert Page(run / "scores/index.html").pictures == []


def test_an_interruption_leaves_what_was_done(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, maps = [0], Scorer.maps

    def interrupted(self: Scorer, images: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return maps(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.Scorer, "maps", interrupted)
        assert cli.main(["score", str(run), str(pictures), "batch_size=1", "device=cpu"]) == 130
    assert "scores.csv.unfinished contains the scores so far" in capsys.readouterr().err
    assert not (run / "scores/scores.csv").exists()
    assert [row["path"] for row in table(run / "scores", "scores.csv.unfinished")] == [f"{pictures}/a/x.png"]
    assert cli.main(["score", str(run), str(pictures / "a"), "device=cpu"]) == 0
    names = {path.name for path in (run / "scores").iterdir()}
    assert names == {"dxmi.json", "scores.csv", "heatmaps", "index.html"}


def test_a_score_that_is_not_finite_is_an_error_of_its_image(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Brightness, "forward", lambda self, x: torch.where(x.mean(1) > 0.9, torch.nan, x.mean(1))
    )
    assert cli.main(["score", str(run), str(pictures / "a"), str(pictures / "b"), "device=cpu"]) == 2
    errors = [row["error"] for row in table(run / "scores") if row["path"].endswith("é.jpg")]
    assert errors == ["its scores are not finite"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["none.png"],
            "IMAGE, FOLDER or FILE must exist, or an argument must be key=value, got 'none.png'",
        ),
        (["treshold=3"], "treshold: unknown key; did you mean threshold?"),
        (["threshold=high"], "threshold must be a number or null, got 'high'"),
        ([], "IMAGE or FOLDER must be given, got none"),
        (["empty"], "FOLDER must have images (.bmp"),
        (["pictures/a/notes.txt"], "IMAGE must be an image, got pictures/a/notes.txt: is empty"),
        (
            ["pictures/x.webp", "output=pictures"],
            "output must be a new folder, an empty one or that of an earlier scoring",
        ),
    ],
)
def test_mistakes_are_one_line(
    run: Path,
    pictures: Path,
    given: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pictures.parent)
    Path("empty").mkdir()
    assert cli.main(["score", str(run), *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dxmi score: {says}") and err.count("\n") == 1
    assert not (run / "scores").exists()


def test_without_pillow_an_earlier_scoring_is_kept(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", str(run), f"{pictures}/a"]) == 0
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["score", str(run), f"{pictures}/a"]) == 2
    assert "requires PIL: pip install 'dxmi_ext[images]'" in capsys.readouterr().err
    assert (run / "scores/scores.csv").is_file()


def test_runs_of_other_tasks_score_nothing(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "task_of", lambda _: SimpleNamespace())
    assert cli.main(["score", str(run), str(pictures)]) == 2
    assert "RUN must be a run of anomaly detection" in capsys.readouterr().err


def test_values_beyond_the_training_images_scale_are_noted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 5000, np.uint16)).save(run / "a.png")
    Image.fromarray(np.full((SIZE, SIZE), 0.5, np.float32)).save(run / "b.tif")
    deep = SimpleNamespace(load_scorer=lambda directory, device: scorer(scale=Scale(4095)).to(device))
    monkeypatch.setattr(tasks, "task_of", lambda _: deep)
    assert cli.main(["score", str(run), f"{run}/a.png", f"{run}/b.tif"]) == 2
    noted = "1 image(s) have values beyond the training images' scale (0 to 4095); these are clipped"
    assert noted in capsys.readouterr().err
    first, second = table(run / "scores")
    assert first["score"] == "10" and second["error"].startswith("has float pixels")


def test_images_are_seen_as_in_training(run: Path, tmp_path: Path) -> None:
    """For images of any mode and size, `dxmi score` gives the network what loading a collection gives."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (SIZE + 1, 5, 3), np.uint8)
    folder = tmp_path / "data/good"
    folder.mkdir(parents=True)
    made = {"rgb": Image.fromarray(colors), "gray": Image.fromarray(colors[..., 0])}
    made["16bit"] = Image.fromarray(colors[..., 0].astype(np.uint16) * 257)
    made["rgba"], made["palette"] = made["rgb"].convert("RGBA"), made["rgb"].quantize(7)
    for name, image in made.items():
        image.save(folder / f"{name}.png")
    exif = Image.Exif()
    exif[274] = 6  # orientation: rotate by 90 degrees clockwise
    made["rgb"].rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    data = anomaly.load(folder.parent, split="train", size=SIZE, train_share=0.9, cache=tmp_path / "cache")
    seen = {Path(name).stem: image for name, image in zip(data.names, data.images, strict=True)}
    assert np.array_equal(seen["16bit"], seen["gray"])
    assert len(seen) == 5
    assert cli.main(["score", str(run), *(str(folder.parent / name) for name in data.names), "worst=0"]) == 0
    scores = [float(row["score"]) for row in table(run / "scores")]
    np.testing.assert_allclose(scores, brightness_of(data.images).max(axis=(1, 2)), rtol=1e-5)
    turned = inspected.read(str(folder / "turned.png"), SIZE, True)
    assert turned.shown is not None and np.array_equal(turned.shown, colors)
