"""Settings: precedence, types, and error messages."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dxmi_ext import tasks
from dxmi_ext.anomaly import settings as anomaly
from dxmi_ext.energies import settings as energies
from dxmi_ext.engine.run_settings import RunnableConfig, RunSettings
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.settings import LARGEST_SEED, ConfigError, Rule, Settings, group, only_with, setting
from dxmi_ext.images import settings as images
from dxmi_ext.two_d import recipe as two_d

pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("error")


@dataclass
class Toys(Settings):
    heading = "toys"
    data: str = setting("8gaussians", "density to learn", choices=("8gaussians", "2spirals"))
    sampler_lr: float = setting(3e-4, "learning rate of the sampler", minimum=0)
    offset: float = setting(0.0, "of the data")
    clip: float | None = setting(None, "gradient norm; null: none", minimum=0)
    decay: float = setting(0.9, "of the average", minimum=0, below=1)
    share: float = setting(0.5, "of the batch", maximum=1)


@dataclass
class ToyConfig(RunnableConfig):
    run: RunSettings = group(RunSettings, log_every=7)
    toys: Toys = group(Toys)

    rules = (
        Rule("share must be <= decay={decay}, got {share}", lambda s: s.share <= s.decay),
        *only_with("data=2spirals", lambda s: s.data == "2spirals", "offset", "log_every"),
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text("recipe: toy\niterations: 70\nsampler_lr: 1e-2\n")
    return path


def test_yaml_goes_over_defaults_and_overrides_over_yaml(recipe: Path) -> None:
    cfg = config.load(ToyConfig, recipe, ["iterations=80", "iterations=90", "clip=1"])
    run, toys = cfg.run, cfg.toys
    assert (run.recipe, run.iterations, toys.sampler_lr, run.batch_size) == ("toy", 90, 1e-2, 256)
    assert toys.clip == 1.0
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
        ("seed=9223372036854775807", LARGEST_SEED),
        ("clip=010.5", 10.5),
        ("pretrained=off", False),
    ],
)
def test_values_are_read_alike_on_the_command_line_and_in_yaml(
    recipe: Path, override: str, value: object
) -> None:
    key, _, text = override.partition("=")
    cfg = config.load(ToyConfig, recipe, [override])
    assert cfg.flat()[key] == value
    recipe.write_text(f"{key}: {text}\n")
    assert config.load(ToyConfig, recipe).flat()[key] == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("iteration=3", "iteration: unknown key; did you mean iterations?"),
        ("a.b=3", "a.b: unknown key"),
        ("iterations=many", "iterations must be an integer, got 'many'"),
        ("iterations=1.5", "iterations must be an integer, got '1.5'"),
        ("seed=0x10", "seed must be an integer, got '0x10'"),
        ("seed=1:30", "seed must be an integer, got '1:30'"),
        ("seed=1e400", "seed must be an integer, got '1e400'"),
        ("seed=\u0663", "seed must be an integer, got '\u0663'"),
        ("seed=9223372036854775808", "seed must be <= 9223372036854775807, got 9223372036854775808"),
        ("threads=100000", "threads must be <= 1024, got 100000"),
        ("log_every=1e10", "log_every must be <= 1000000000, got 10000000000"),
        ("clip=1e31", "clip must be <= 1e+30, got 1e+31"),
        ("offset=-1e31", "offset must be >= -1e+30, got -1e+31"),
        ("output=a\0b", "output must be text or null, got 'a\\x00b'"),
        ("iterations=", "iterations must be an integer, got null"),
        ("iterations=[1", "iterations must be an integer, got '[1'"),
        ("iterations=${nothing}", "iterations must be an integer, got '${nothing}'"),
        ("pretrained=maybe", "pretrained must be true or false, got 'maybe'"),
        ("clip=big", "clip must be a number or null, got 'big'"),
        ("data=9gaussians", "data must be one of 8gaussians, 2spirals, got '9gaussians'"),
        ("batch_size=0", "batch_size must be >= 1, got 0"),
        ("sampler_lr=nan", "sampler_lr must be finite, got nan"),
        ("sampler_lr=inf", "sampler_lr must be finite, got inf"),
        ("decay=1", "decay must be < 1, got 1.0"),
        ("share=1.1", "share must be <= 1, got 1.1"),
        ("device=gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("iterations", "a setting must be key=value, got 'iterations'"),
    ],
)
def test_bad_override(recipe: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(ToyConfig, recipe, [override])
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "tau=.2 tau_entropy=.1 tau_velocity=.1",
            "tau must not be given with both tau_entropy",
        ),
        (
            "sampler_update=policy_gradient costs_in=value",
            "costs_in must be both or sampler with",
        ),
        (
            "noise_magnitude=100",
            "noise_magnitude needs energy_loss=noise_contrastive, got noise_",
        ),
        ("td_lambda=.5 td_redraw=true", "td_redraw must be false with td_lambda=0.5, whose returns are of"),
        (
            "expected_cost=true sampler_update=backprop",
            "expected_cost must be false with sampler_update=backprop, got true",
        ),
        ("tau_rate=.1 tau_entropy=0", "tau_rate must be 0 if the temperature of the entropy is 0"),
        ("tau_rate=.1 negatives=refined", "tau_rate must be 0 with Langevin chains"),
        ("tau_rate=.1 negatives=short_run", "tau_rate must be 0 with Langevin chains"),
        ("energy_lr=.1", "energy_lr needs value_kind=separate, got energy_lr=0.1"),
        ("energy_clip=.1 value_kind=time_independent", "energy_clip needs value_kind=separate"),
        ("cuda_graph=true device=cpu", "cuda_graph must be false with device=cpu, got true"),
        ("schedule=edm steps=1", "steps must be >= 2 with schedule=edm, got 1"),
        ("schedule=edm lengths=1,5", "lengths must be >= 2 with schedule=edm, got 1,5"),
        (
            "schedule=edm step_input=levels untrained_lengths=1,7",
            "untrained_lengths must be >= 2 with schedule=edm, got 1,7",
        ),
        ("random_spacing=.5", "random_spacing must be 0 without step_input=levels, got 0.5"),
        (
            "random_spacing=.5 step_input=levels schedule=ddpm",
            "random_spacing must be 0 with schedule=ddpm, got 0.5",
        ),
        ("skip_last=6", "skip_last must be <= steps=5, got 6"),
        ("ema_decay=1", "ema_decay must be < 1, got 1.0"),
        ("tau_rate=.1 batch_size=1", "batch_size must be >= 2 with tau_rate=0.1, got 1"),
        ("task=images", "task must be two_d, got images"),
        # A typed value counts even if it is the default.
        ("tau=.1 tau_entropy=.1 tau_velocity=.1", "tau must not be given with both"),
        ("energy_lr=.001", "energy_lr needs value_kind=separate, got energy_lr=0.001"),
    ],
)
def test_settings_without_effect_are_rejected(overrides: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(two_d.Config, None, overrides.split())
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("task", "overrides", "told"),
    [
        (two_d, "tau_hold=.2", "tau_hold has no effect without tau_rate > 0 or tau_cooling < 1"),
        (two_d, "tau_hold=.2 tau_rate=.1", None),
        (two_d, "length_draw=short", "length_draw has no effect without lengths"),
        (two_d, "langevin_pool=9 negatives=short_run", "langevin_pool has no effect without negatives=persi"),
        (two_d, "pretrain_iterations=9 pretrained=false", "pretrain_iterations has no effect without"),
        (images, "rho=5", "rho has no effect without schedule=edm"),
        (images, "prediction=v schedule=edm", "prediction has no effect without schedule=fastdpm or ddim"),
        (anomaly, "langevin_steps=9 baselines=all", None),
        (energies, "var_last=.5 steps=1", "var_last has no effect without steps > 1"),
        (energies, "replay=.5", "replay has no effect without sampler=vgs"),
        (energies, "sampler_lr=1e-4 sampler=vgs", "sampler_lr has no effect without sampler=dxmi"),
    ],
)
def test_settings_without_effect_are_told(task: Any, overrides: str, told: str | None) -> None:
    typed = [text.partition("=")[0] for text in overrides.split()]
    sentences = config.load(task.Config, None, overrides.split()).without_effect(typed)
    assert sentences == [] if told is None else len(sentences) == 1 and sentences[0].startswith(told)


@pytest.mark.parametrize("task", [two_d, images, anomaly, energies])
def test_effects_are_of_settings_that_exist(task: Any) -> None:
    cfg = config.load(task.Config, None, [])
    assert cfg.keys().keys() >= {key for effect in cfg.effects for key in effect.keys}
    cfg.without_effect(cfg.keys())


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
        ("seed: x", "seed must be an integer, got 'x'"),
        ("- seed", "must be a mapping of keys to values, got a list"),
        ("seed: [", "cannot be read as yaml"),
        ("null: 2", "null: unknown key"),
        ("3: 2", "3: unknown key"),
        ("? [a]\n: 2", "a key must be a single value, got a mapping"),
        ("seed: [1, 2]", "seed must be a single value, got a list"),
        ("seed: {a: 2}", "seed must be a single value, got a mapping"),
        ("seed: &a [*a]", "seed must be a single value, got a list"),
        ("<<: {seed: 3}", "<< must be a single value, got a mapping"),
        ("seed: 1\nseed: 2", "seed must be given once, got two values"),
        ("seed: *missing", "cannot be read as yaml: found undefined alias"),
        ("seed: " + "[" * 100_000, "cannot be read as yaml: it is nested too deeply"),
        ("#" * 2**21, "must be at most 1048576 bytes of yaml"),
        ("# nothing", "must be a mapping of keys to values, got an empty file"),
        ("text", "must be a mapping of keys to values, got text"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("seed: \0", "cannot be read as yaml"),
        (b"seed: \xff", "cannot be read as yaml"),
        ('output: "\\uD800"', "output must be text or null, got '\\ud800'"),
        ("output: ~nobody-of-that-name/x", "output must not begin with ~ where its home folder is unknown"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as error:
        config.load(ToyConfig, path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.yaml", ""])  # the latter is the folder itself
def test_a_yaml_that_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / name}: cannot be read as yaml")):
        config.load(ToyConfig, tmp_path / name)


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("output: ~/run\nresume: ~/run/checkpoints/step_00000001\n")
    cfg = config.load(ToyConfig, tmp_path / "a.yaml")
    assert (cfg.run.output, cfg.run.resume) == (
        f"{tmp_path}/run",
        f"{tmp_path}/run/checkpoints/step_00000001",
    )
    assert config.load(ToyConfig, None, ["output=~", "wandb=~"]).run.output == str(tmp_path)
    assert config.load(ToyConfig, None, ["output=a~"]).run.output == "a~"


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9-\xc3\xa9")
    cfg = config.load(ToyConfig, None, [f"output={name}"])
    config.save(cfg, tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_bytes().isascii() is False
    again = config.load(ToyConfig, tmp_path / "a.yaml")
    assert (
        again == cfg and again.run.output is not None and os.fsencode(again.run.output) == b"caf\xe9-\xc3\xa9"
    )


def test_every_number_of_every_command_has_a_largest_value() -> None:
    """So that a number that is too large fails at once, not at the end of a run or for lack of memory."""
    pending, seen = [Settings], set[type[Settings]]()
    for module in (
        "images.networks.exchange",
        "method.generate",
        "reproduce.command",
        "anomaly.scores.inspection",
    ):
        importlib.import_module(f"dxmi_ext.{module}")
    for task in tasks.tasks():
        tasks.load(task)
    while pending:
        pending += (cls := pending.pop()).__subclasses__()
        seen.add(cls)
    assert {"RunSettings", "SampleSettings", "ScoreSettings", "ReproduceSettings"} <= {
        c.__name__ for c in seen
    }
    for cls in seen:
        for name, wanted in typing.get_type_hints(cls).items():
            kinds = typing.get_args(wanted) or (wanted,)
            if int in kinds or float in kinds:
                with pytest.raises(ConfigError, match=rf"^{name} must be <=? \S+, got 1(0+|e\+300)$"):
                    cls(**{name: 10**30 if int in kinds else 1e300})


def test_given_is_what_was_typed_or_differs_from_the_default(tmp_path: Path, recipe: Path) -> None:
    cfg = config.load(ToyConfig, recipe, ["share=.5", "clip=null"])
    assert cfg.given == {"recipe", "iterations", "sampler_lr", "share", "clip"}
    config.save(cfg, tmp_path / "a.yaml")  # has all keys
    assert config.load(ToyConfig, tmp_path / "a.yaml").given == {"recipe", "iterations", "sampler_lr"}
    default = f"sampler_lr={ToyConfig().flat()['sampler_lr']}"
    assert config.load(ToyConfig, tmp_path / "a.yaml", [default]).given == {"recipe", "iterations"}
    changed = cfg.replace(seed=3, decay=0.8)
    assert changed.given == cfg.given | {"seed", "decay"} and changed.flat() == cfg.flat() | {
        "seed": 3,
        "decay": 0.8,
    }
    assert ToyConfig.of({"share": 0.5}).given == {"share"} and ToyConfig().given == set()
    for make in (lambda: ToyConfig.of({"shear": 0.5}), lambda: cfg.replace(shear=0.5)):
        with pytest.raises(ConfigError, match=r"^shear: unknown key$"):
            make()


def test_rules_are_checked_whenever_settings_are_made(recipe: Path) -> None:
    for message, override in (
        ("share must be <= decay=0.9, got 0.95", "share=.95"),
        ("log_every needs data=2spirals, got log_every=7", "log_every=7"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            config.load(ToyConfig, recipe, [override])
    with pytest.raises(ConfigError, match=r"^share must be <= decay=0\.4, got 0\.5$"):
        config.load(ToyConfig, recipe).replace(decay=0.4)
    config.load(ToyConfig, recipe, ["data=2spirals", "offset=0", "log_every=7"])


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
    lines, keys = [*run.splitlines()[1:], *toys.splitlines()[1:]], ToyConfig.keys()
    assert [line.split("=")[0].strip() for line in lines] == list(keys)
    by_key = {line.split("=")[0].strip(): line for line in lines}
    assert by_key["iterations"].split() == ["iterations=70", "iterations", "of", "DxMI"]
    assert by_key["log_every"].split()[0] == "log_every=7"
    assert by_key["data"].endswith("density to learn (8gaussians | 2spirals)")
    assert "pretrained=true" in by_key["pretrained"] and "clip=null" in by_key["clip"]
    columns = {line.index(key.metadata["help"]) for line, key in zip(lines, keys.values(), strict=True)}
    assert len(columns) == 1


def test_without_pyyaml_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from dxmi_ext.engine.runs import config\n"
        "from dxmi_ext.engine.run_settings import RunSettings\n"
        "try: config.load(RunSettings, 'x.yaml')\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dxmi_ext[train]'" in run.stdout


def test_a_removed_key_is_ignored_in_a_yaml_and_rejected_on_the_command_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ToyConfig, "removed", {"momentum": "decay takes its place"})
    recipe.write_text(recipe.read_text() + "momentum: 0.9\n")
    for _ in range(2):  # the note appears once
        assert config.load(ToyConfig, recipe).run.iterations == 70
    told = f"{recipe}: momentum is no longer a setting and is ignored; decay takes its place\n"
    assert capsys.readouterr().err == told
    with pytest.raises(ConfigError, match="momentum is no longer a setting; decay takes its"):
        config.load(ToyConfig, None, ["momentum=.9"])
