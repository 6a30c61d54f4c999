"""Settings: precedence, types, and errors that say what is wrong."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from dxmi_ext import config
from dxmi_ext.config import ConfigError, RunConfig, setting
from dxmi_ext.recipes import two_d

pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("error")


@dataclass
class ToyConfig(RunConfig):
    heading = "toys"
    data: str = setting("8gaussians", "density to learn", choices=("8gaussians", "2spirals"))
    sampler_lr: float = setting(3e-4, "learning rate of the sampler", minimum=0)
    offset: float = setting(0.0, "of the data")
    clip: float | None = setting(None, "gradient norm; null: none", minimum=0)
    decay: float = setting(0.9, "of the average", minimum=0, below=1)
    share: float = setting(0.5, "of the batch", maximum=1)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text("recipe: toy\niterations: 70\nsampler_lr: 1e-2\n")
    return path


def test_yaml_goes_over_defaults_and_overrides_over_yaml(recipe: Path) -> None:
    cfg = config.load(ToyConfig, recipe, ["iterations=80", "iterations=90", "clip=1"])
    assert (cfg.recipe, cfg.iterations, cfg.sampler_lr, cfg.batch_size) == ("toy", 90, 1e-2, 256)
    assert cfg.clip == 1.0
    assert type(cfg) is ToyConfig


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output=007", "007"),
        ("output=a=b", "a=b"),
        ("output=1e3", "1e3"),
        ("output=null", None),
        ("output=", None),
        ("sampler_lr=1e-4", 1e-4),
        ("pretrained=false", False),
        ("clip=null", None),
        ("device=cuda:1", "cuda:1"),
        ("seed=010", 10),
        ("seed=1e3", 1000),
        ("seed=1_000", 1000),
        ("seed=9223372036854775807", config.LARGEST_SEED),
        ("clip=010.5", 10.5),
        ("pretrained=off", False),
    ],
)
def test_values_are_read_alike_on_the_command_line_and_in_yaml(
    recipe: Path, override: str, value: object
) -> None:
    key, _, text = override.partition("=")
    cfg = config.load(ToyConfig, recipe, [override])
    assert getattr(cfg, key) == value
    recipe.write_text(f"{key}: {text}\n")
    assert getattr(config.load(ToyConfig, recipe), key) == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("iteration=3", "iteration: unknown key; did you mean iterations?"),
        ("a.b=3", "a.b: unknown key"),
        ("iterations=many", "iterations: got 'many', wants int"),
        ("iterations=1.5", "iterations: got '1.5', wants int"),
        ("seed=0x10", "seed: got '0x10', wants int"),
        ("seed=1:30", "seed: got '1:30', wants int"),
        ("seed=1e400", "seed: got '1e400', wants int"),
        ("seed=\u0663", "seed: got '\u0663', wants int"),
        ("seed=9223372036854775808", "seed: got 9223372036854775808, wants 9223372036854775807 or less"),
        ("threads=100000", "threads: got 100000, wants 1024 or less"),
        ("log_every=1e10", "log_every: got 10000000000, wants 1000000000 or less"),
        ("clip=1e31", "clip: got 1e+31, wants 1e+30 or less"),
        ("offset=-1e31", "offset: got -1e+31, wants -1e+30 or more"),
        ("output=a\0b", "output: got 'a\\x00b', wants str | None"),
        ("iterations=", "iterations: got None, wants int"),
        ("iterations=[1", "iterations: got '[1', wants int"),
        ("iterations=${nothing}", "iterations: got '${nothing}', wants int"),
        ("pretrained=maybe", "pretrained: got 'maybe', wants bool"),
        ("clip=big", "clip: got 'big', wants float | None"),
        ("data=9gaussians", "data: got '9gaussians', wants one of 8gaussians, 2spirals"),
        ("batch_size=0", "batch_size: got 0, wants 1 or more"),
        ("sampler_lr=nan", "sampler_lr: got nan, wants a finite number"),
        ("sampler_lr=inf", "sampler_lr: got inf, wants a finite number"),
        ("decay=1", "decay: got 1.0, wants less than 1"),
        ("share=1.1", "share: got 1.1, wants 1 or less"),
        ("device=gpu", "device: got 'gpu', wants auto, cpu, cuda or cuda:N"),
        ("iterations", "iterations: wants key=value"),
    ],
)
def test_bad_override(recipe: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(ToyConfig, recipe, [override])
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("tau=.2 tau_entropy=.1 tau_velocity=.1", "tau: got 0.2, but tau_entropy and tau_velocity both"),
        ("sampler_update=policy_gradient costs_in=value", "costs_in: got 'value', but with"),
        ("noise_magnitude=100", "noise_magnitude: got 100.0, wants energy_loss=noise_contrastive with it"),
        ("tau_rate=.1 tau_entropy=0", "tau_rate: got 0.1, but the entropy's tau is 0"),
        ("tau_rate=.1 negatives=refined", "tau_rate: got 0.1, but Langevin chains do not follow it"),
        ("tau_rate=.1 negatives=short_run", "tau_rate: got 0.1, but Langevin chains do not follow it"),
        ("energy_lr=.1", "energy_lr: got 0.1, but with value_kind=per_step"),
        ("energy_clip=.1 value_kind=time_independent", "energy_clip: got 0.1, but with"),
        ("cuda_graph=true device=cpu", "cuda_graph: got true, wants a CUDA device"),
        ("schedule=edm steps=1", "steps: got 1, wants 2 or more with schedule=edm"),
        ("schedule=edm lengths=1,5", "lengths: got '1,5', wants 2 or more with schedule=edm"),
        ("skip_last=6", "skip_last: got 6, wants at most steps=5"),
        ("ema_decay=1", "ema_decay: got 1.0, wants less than 1"),
        ("task=images", "task: got 'images', wants one of two_d"),
    ],
)
def test_settings_without_effect_are_refused(overrides: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(two_d.Config, None, overrides.split())
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    "overrides",
    [
        "tau=.2 tau_entropy=.1",
        "tau_entropy=.1 tau_velocity=.1",
        "sampler_update=policy_gradient costs_in=value tau=0",
        "energy_lr=.1 value_kind=separate",
        "tau_rate=.1 negatives=refined langevin_noise=.1",
        "td_order=shuffled td_redraw=true velocity_decay=1",
        "value_kind=time_independent costs_in=sampler",  # the paper's row without time cost
    ],
)
def test_settings_that_work_together(overrides: str) -> None:
    config.load(two_d.Config, None, overrides.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("iteratons: 3", "did you mean iterations?"),
        ("seed: x", "seed: got 'x', wants int"),
        ("- seed", "got a list, wants a mapping"),
        ("seed: [", "cannot be read as yaml"),
        ("null: 2", "null: unknown key"),
        ("3: 2", "3: unknown key"),
        ("? [a]\n: 2", "a key must be a single value, got a mapping"),
        ("seed: [1, 2]", "seed must be a single value, got a list"),
        ("seed: {a: 2}", "seed must be a single value, got a mapping"),
        ("seed: &a [*a]", "seed must be a single value, got a list"),
        ("<<: {seed: 3}", "<< must be a single value, got a mapping"),
        ("seed: 1\nseed: 2", "seed must be given once, got it twice"),
        ("seed: *missing", "cannot be read as yaml: found undefined alias"),
        ("seed: " + "[" * 100_000, "cannot be read as yaml: it is nested too deeply"),
        ("#" * 2**21, "must be at most 1048576 bytes of yaml"),
        ("# nothing", "got an empty file, wants a mapping"),
        ("text", "got text, wants a mapping"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("seed: \0", "cannot be read as yaml"),
        (b"seed: \xff", "cannot be read as yaml"),
        ('output: "\\uD800"', "output: got '\\ud800', wants str"),
        ("output: ~nobody-of-that-name/x", "output must not begin with ~ where its home folder is unknown"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as error:
        config.load(ToyConfig, path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.yaml", ""])  # the latter is the folder
def test_a_yaml_that_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / name}: cannot be read as yaml")):
        config.load(ToyConfig, tmp_path / name)


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("output: ~/run\nresume: ~/run/checkpoints/step_00000001\n")
    cfg = config.load(ToyConfig, tmp_path / "a.yaml")
    assert (cfg.output, cfg.resume) == (f"{tmp_path}/run", f"{tmp_path}/run/checkpoints/step_00000001")
    assert config.load(ToyConfig, None, ["output=~", "wandb=~"]).output == str(tmp_path)
    assert config.load(ToyConfig, None, ["output=a~"]).output == "a~"


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9-\xc3\xa9")
    cfg = config.load(ToyConfig, None, [f"output={name}"])
    config.save(cfg, tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_bytes().isascii() is False
    again = config.load(ToyConfig, tmp_path / "a.yaml")
    assert again == cfg and again.output is not None and os.fsencode(again.output) == b"caf\xe9-\xc3\xa9"


def test_every_number_of_every_command_has_a_largest_value() -> None:
    """Nothing waits until the end of a run, or takes the machine down, to find a number too large."""
    pending, seen = [config.Settings], set[type]()
    for module in ("exchange", "generate", "reproduce", "anomaly.inspection", "recipes.images"):
        importlib.import_module(f"dxmi_ext.{module}")
    importlib.import_module("dxmi_ext.recipes.anomaly")
    while pending:
        pending += (cls := pending.pop()).__subclasses__()
        seen.add(cls)
    assert {"RunConfig", "SampleSettings", "ScoreSettings", "ReproduceSettings"} <= {c.__name__ for c in seen}
    for cls in seen:
        for name, wanted in typing.get_type_hints(cls).items():
            kinds = typing.get_args(wanted) or (wanted,)
            if int in kinds or float in kinds:
                with pytest.raises(ConfigError, match=rf"^{name}: got 1(0+|e\+300), wants (\d|less than)"):
                    cls(**{name: 10**30 if int in kinds else 1e300})


def test_save_and_load_give_the_same_settings_and_bytes(tmp_path: Path, recipe: Path) -> None:
    cfg = config.load(ToyConfig, recipe, ["output=007", "clip=.1"])
    config.save(cfg, tmp_path / "a.yaml")
    again = config.load(ToyConfig, tmp_path / "a.yaml")
    config.save(again, tmp_path / "b.yaml")
    assert again == cfg
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


def test_describe_lists_every_key_aligned(recipe: Path) -> None:
    run, toys = config.describe(config.load(ToyConfig, recipe)).split("\n\n")
    assert run.startswith("the run:\n  recipe=toy") and toys.startswith("toys:\n  data=")
    lines = [*run.splitlines()[1:], *toys.splitlines()[1:]]
    assert [line.split("=")[0].strip() for line in lines] == list(ToyConfig.__dataclass_fields__)
    by_key = {line.split("=")[0].strip(): line for line in lines}
    assert by_key["iterations"].split() == ["iterations=70", "iterations", "of", "DxMI"]
    assert by_key["data"].endswith("density to learn (8gaussians | 2spirals)")
    assert "pretrained=true" in by_key["pretrained"] and "clip=null" in by_key["clip"]
    columns = {
        line.index(field.metadata["help"])
        for line, field in zip(lines, ToyConfig.__dataclass_fields__.values(), strict=True)
    }
    assert len(columns) == 1


def test_without_pyyaml_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from dxmi_ext import config\n"
        "try: config.load(config.RunConfig, 'x.yaml')\n"
        "except config.ConfigError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dxmi_ext[train]'" in run.stdout
