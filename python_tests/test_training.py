"""The public interface: a user's own networks and data through `fit`, `save` and `load`."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dxmi_ext
from dxmi_ext import cli
from dxmi_ext.engine.runs.signals import Stopped
from dxmi_ext.engine.storage import folders

DATA = torch.arange(60.0).view(20, 3) / 30 - 1
STEPS, ITERATIONS = 4, 6
SCHEDULE = dxmi_ext.schedules.variance_exploding(STEPS, sigma_max=1.0, sigma_min=0.1)


class Field(nn.Module):
    """(x [N, 3], timestep [N], labels [N]) -> [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.step = nn.Linear(3, width), nn.Embedding(STEPS + 1, width)
        self.label = nn.Embedding(2, width)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = 0 if labels is None else self.label(labels)
        return self.linear(x) + self.step(timestep) + shift


class Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = Field(4)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.field(x, timestep, labels).square().sum(1)


def networks(width: int = 3) -> dxmi_ext.Networks:
    torch.manual_seed(0)
    return dxmi_ext.Networks(dxmi_ext.GaussianSampler(Field(width), SCHEDULE, (3,)), Value())


def trainer(seed: int = 0, **settings: Any) -> dxmi_ext.DxMITrainer:
    algorithm = dxmi_ext.DxMISettings(**settings)
    return dxmi_ext.DxMITrainer(networks(), algorithm, iterations=ITERATIONS, seed=seed)


def pretrainer(**options: Any) -> dxmi_ext.Pretrainer:
    levels = dxmi_ext.uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
    options = {"lr": 1e-2, "iterations": 3, "seed": 0} | options
    return dxmi_ext.Pretrainer(networks().sampler.network, levels, **options)


def batches(batch_size: int = 8) -> Any:
    return dxmi_ext.shuffled(DATA, batch_size)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_fit_equals_a_plain_loop_and_writes_a_run(tmp_path: Path) -> None:
    plain, fitted, drawn = trainer(), trainer(), []
    for i in range(ITERATIONS):
        plain.step(batches()(i))
    summary = dxmi_ext.fit(
        fitted,
        batches(),
        output=tmp_path / "run",
        log_every=2,
        picture_every=3,
        picture=lambda file: drawn.append(file.write(b"png")),
    )
    assert same(plain.averaged, fitted.averaged) and same(plain.networks, fitted.networks)
    assert summary["metrics"].keys() >= {"energy_loss", "value_loss", "sampler_loss"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == ITERATIONS
    assert len(drawn) == 2 and (tmp_path / "run" / "pictures" / "dxmi_00000003.png").is_file()
    assert same(dxmi_ext.load(tmp_path / "run", networks()), fitted.averaged)


def test_a_stopped_fit_resumes_and_a_finished_one_restores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped, resumed, again = (trainer() for _ in range(4))
    dxmi_ext.fit(whole, batches(), output=tmp_path / "whole")

    def stopping(iteration: int) -> Tensor:
        if iteration == 4:
            raise Stopped
        return batches()(iteration)

    with pytest.raises(KeyboardInterrupt):
        dxmi_ext.fit(stopped, stopping, output=tmp_path / "run", resume="never", checkpoint_every=2)
    assert "stopped at iteration 4; this call with resume='auto' resumes" in capsys.readouterr().err
    seen = []
    summary = dxmi_ext.fit(resumed, lambda i: (seen.append(i), batches()(i))[1], output=tmp_path / "run")
    assert seen == [0, 4, 5] and summary["resumed_from"] == [4]  # the first determines the batch size
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "run" / model).read_bytes()
    assert dxmi_ext.fit(again, batches(), output=tmp_path / "run") == summary
    assert again.iteration == ITERATIONS and same(again.averaged, whole.averaged)


def test_pretraining_then_dxmi(tmp_path: Path) -> None:
    first = pretrainer()
    dxmi_ext.fit(first, batches(), output=tmp_path / "pretrain")
    with pytest.raises(dxmi_ext.ConfigError, match=r"output must be .* 'dxmi', got .* 'pretrain'"):
        dxmi_ext.fit(trainer(), batches(), output=tmp_path / "pretrain")
    assert same(dxmi_ext.load(tmp_path / "pretrain", Field(3)), first.network)


def test_fit_notes_what_makes_it_slow_or_appear_to_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    options: dict[str, Any] = {"execution": dxmi_ext.ExecutionSettings(precision="bfloat16")}
    slow, plain = pretrainer(**options), pretrainer()
    slow.execution.compile = True  # noted, but networks are compiled only when a trainer is made
    dxmi_ext.fit(slow, batches(), output=tmp_path / "slow")
    told = capsys.readouterr().err
    assert "precision=bfloat16 is emulated" in told and "compile=true compiles the networks" in told
    dxmi_ext.fit(plain, batches(), output=tmp_path / "plain")
    told = capsys.readouterr().err
    assert "bfloat16" not in told and "compile" not in told


def test_a_pretraining_resumes_with_the_same_arguments_only(tmp_path: Path) -> None:
    dxmi_ext.fit(pretrainer(sigma_data=DATA.double().numpy().std()), batches(), output=tmp_path / "run")
    with pytest.raises(dxmi_ext.ConfigError, match=r"sigma_data must be 0\.57\d+ as in the run"):
        dxmi_ext.fit(pretrainer(iterations=4), batches(), output=tmp_path / "run")
    dxmi_ext.fit(pretrainer(), batches(), output=tmp_path / "other")
    for argument in ({"lr": 0.02}, {"warmup": 1}, {"ema_decay": 0.5}, {"clip": 1.0}, {"prediction": "v"}):
        with pytest.raises(dxmi_ext.ConfigError, match=f"{next(iter(argument))} must be .* as in the run"):
            dxmi_ext.fit(pretrainer(iterations=4, **argument), batches(), output=tmp_path / "other")
    dxmi_ext.fit(longer := pretrainer(iterations=4), batches(), output=tmp_path / "other")
    assert longer.iteration == 4


def test_commands_on_a_folder_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report needs no networks; commands that do print Python code that loads them, which works."""
    run = tmp_path / "run"
    dxmi_ext.fit(made := trainer(), batches(), output=run, log_every=1)
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Finished: " in page and "Curves" in page
    capsys.readouterr()
    for command in ("sample", "evaluate", "export", "score"):
        assert cli.main([command, str(run)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "is a run of dxmi_ext.fit" in error
        load = error[error.index("dxmi_ext.load(") : error.index(" loads their weights")]
        assert same(eval(load, {"dxmi_ext": dxmi_ext, "networks": networks()}), made.averaged)


def test_labels_and_loaders(tmp_path: Path) -> None:
    labels = torch.arange(20) % 2
    rows = dxmi_ext.shuffled(DATA, 8, labels=labels)
    dxmi_ext.fit(trainer(), rows, output=tmp_path / "labels")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA), batch_size=8)
    by_loader, by_list = trainer(), trainer()
    dxmi_ext.fit(by_loader, loader, output=tmp_path / "loader")
    dxmi_ext.fit(by_list, [DATA[:8], DATA[8:16], DATA[16:]], output=tmp_path / "list")
    assert same(by_loader.networks, by_list.networks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches must yield batches each time they are iterated, .* got 0 in total"),
        (7, "batches must be a function of the iteration, .* or an iterable of batches, got int"),
        (DATA, "batches must be a function of the iteration, .* or an iterable of batches, got Tensor"),
        ([DATA[:8, :2]], r"data of shape \[B, 3\], B >= 1, got \[8, 2\]"),
        ([DATA[:0]], r"B >= 1, got \[0, 3\]"),
        ([DATA[:8].long()], "data of the networks' torch.float32, got torch.int64"),
        ([DATA[:8].double()], "data of the networks' torch.float32, got torch.float64"),
        ([(DATA[:8], torch.zeros(7))], r"labels of a batch must have shape \[8\], got \[7\]"),
        (["rows"], "a batch must be a tensor of data"),
        ([DATA[:8].numpy()], r"a batch must be a tensor of data, or data and labels, got \(ndarray\)"),
    ],
)
def test_bad_batches(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(dxmi_ext.ConfigError, match=message):
        dxmi_ext.fit(trainer(), given, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_generator_must_last(tmp_path: Path) -> None:
    few = (DATA[:8] for _ in range(ITERATIONS - 1))
    with pytest.raises(
        dxmi_ext.ConfigError, match=f"or enough for all iterations, got {ITERATIONS - 1} in total"
    ):
        dxmi_ext.fit(trainer(), few, output=tmp_path / "run")


def test_data_are_constants() -> None:
    """No gradient reaches the network that computed them, and those of inference mode are copied."""
    encoder, made = nn.Linear(3, 3), trainer()
    for batch in (dxmi_ext.shuffled(encoder(DATA), 8)(0), encoder(DATA)):
        made.step(batch)
    assert encoder.weight.grad is None
    with torch.inference_mode():
        data, labels = DATA.clone(), torch.zeros(len(DATA), dtype=torch.int64)
        with pytest.raises(dxmi_ext.ConfigError, match=r"outside torch\.inference_mode"):
            made.step(data)
    with torch.no_grad():
        made.step((data, labels))


def test_ranks_get_rows_of_their_own(tmp_path: Path) -> None:
    first = dataclasses.replace(dxmi_ext.Ranks(), world_size=2)
    batches_of_one = dxmi_ext.shuffled(DATA, 8, ranks=first)
    with pytest.raises(dxmi_ext.ConfigError, match="got rows 0 to 3 of each batch on rank 0 of 1"):
        dxmi_ext.fit(trainer(), batches_of_one, output=tmp_path / "run")


def test_another_schedule_does_not_fit(tmp_path: Path) -> None:
    dxmi_ext.save(tmp_path / "saved", nn.ModuleDict({"first": Value(), "networks": networks()}))
    schedule = dxmi_ext.schedules.variance_exploding(STEPS, sigma_max=2.0, sigma_min=0.1)
    sampler = dxmi_ext.GaussianSampler(Field(3), schedule, (3,))
    others = nn.ModuleDict({"first": Value(), "networks": dxmi_ext.Networks(sampler, Value())})
    before = copy.deepcopy(others)
    message = r"schedule must be that of the saved sampler, whose output_coef\[0\] is -0\.7846"
    with pytest.raises(dxmi_ext.CheckpointError, match=message):
        dxmi_ext.load(tmp_path / "saved", others)
    assert same(others, before)


def test_a_folder_of_another_run_or_of_others_is_rejected(tmp_path: Path) -> None:
    dxmi_ext.fit(trainer(), batches(), output=tmp_path / "run")
    chains = dxmi_ext.LangevinSettings(langevin_steps=3)
    refined = dxmi_ext.DxMITrainer(
        networks(), dxmi_ext.DxMISettings(), iterations=ITERATIONS, seed=0, langevin=chains
    )
    for other, rows, what in (
        (refined, batches(), "langevin_steps must be 10"),
        (trainer(seed=1), batches(), "seed must be 0"),
        (trainer(tau=0.2), batches(), "tau must be 0.1"),
        (trainer(), batches(4), "batch_size must be 8"),
    ):
        with pytest.raises(dxmi_ext.ConfigError, match=f"{what} as in the run"):
            dxmi_ext.fit(other, rows, output=tmp_path / "run")
    with pytest.raises(dxmi_ext.ConfigError, match="output must be a path, got ''"):
        dxmi_ext.fit(trainer(), batches(), output="")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(folders.FolderError, match=r"thesis\.tex"):
        dxmi_ext.fit(trainer(), batches(), output=tmp_path / "mine")


def test_resume_names_no_checkpoint(tmp_path: Path) -> None:
    dxmi_ext.fit(trainer(), batches(), output=tmp_path / "run")
    (tmp_path / "file").touch()
    for resume, why in (
        ("absent", "which does not exist"),
        ("file", "which is a file"),
        ("run/model", r"which has no manifest\.json"),
        ("run", r"which is a run; its last checkpoint is .*run.checkpoints.step_00000006"),
    ):
        with pytest.raises(dxmi_ext.CheckpointError, match=f"resume must be auto, never .* {why}"):
            dxmi_ext.fit(trainer(), batches(), output=tmp_path / "new", resume=str(tmp_path / resume))
        assert not (tmp_path / "new").exists()


def test_resume_from_a_checkpoint_of_another_phase(tmp_path: Path) -> None:
    dxmi_ext.fit(pretrainer(), batches(), output=tmp_path / "pretrain")
    source = tmp_path / "pretrain" / "checkpoints" / "step_00000003"
    with pytest.raises(dxmi_ext.CheckpointError, match="must be of the phase 'dxmi', got one of 'pretrain'"):
        dxmi_ext.fit(trainer(), batches(), output=tmp_path / "dxmi", resume=source)


def test_a_checkpoint_that_does_not_fit_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    dxmi_ext.fit(trainer(), batches(), output=tmp_path / "run")
    wider = networks()
    wider.value.field = Field(5)
    other = dxmi_ext.DxMITrainer(wider, dxmi_ext.DxMISettings(), iterations=ITERATIONS, seed=0)
    dxmi_ext.fit(other, batches(), output=tmp_path / "other", checkpoint_every=2)
    folder = tmp_path / "run"
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    source = tmp_path / "other" / "checkpoints" / "step_00000004"
    with pytest.raises(dxmi_ext.CheckpointError, match=r"^the checkpoint does not fit the networks: [^\n]*$"):
        dxmi_ext.fit(trainer(), batches(), output=folder, resume=source)
    assert {path: path.read_bytes() for path in files} == before


def test_shuffled_passes_every_row_once_an_epoch_on_any_number_of_ranks() -> None:
    rows = torch.arange(10.0)[:, None]
    drawn = torch.cat([dxmi_ext.shuffled(rows, 4, seed=3)(i) for i in range(5)])[:, 0]
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:])
    ranks = [dxmi_ext.Ranks(rank=r, world_size=2) for r in range(2)]
    parts = [[dxmi_ext.shuffled(rows, 4, seed=3, ranks=r)(i) for r in ranks] for i in range(5)]
    assert torch.equal(torch.cat([torch.cat(part) for part in parts])[:, 0], drawn)
    for wrong in (
        {"batch_size": 0},
        {"batch_size": 3, "ranks": ranks[0]},
        {"batch_size": 2, "data": rows[:0]},
    ):
        with pytest.raises(dxmi_ext.ConfigError, match="must"):
            dxmi_ext.shuffled(**({"data": rows} | wrong))


def test_fit_knows_the_data_of_shuffled(tmp_path: Path) -> None:
    labels = torch.arange(len(DATA))
    others = [(DATA.double(), None), (DATA, labels), (DATA, labels + 1), (DATA[1:], None)]
    prints = [dxmi_ext.shuffled(rows, 4, labels=given).fingerprint() for rows, given in others]
    assert len({*prints, batches().fingerprint()}) == 5
    assert dxmi_ext.shuffled(DATA.clone(), 4, seed=1).fingerprint() == batches().fingerprint()
    column = dxmi_ext.shuffled(DATA, 4, labels=torch.stack((labels, -labels), dim=1)[:, 0])
    assert column.fingerprint() == prints[1]

    def fit(make: Any, iterations: int) -> None:
        algorithm = dxmi_ext.DxMISettings()
        learns = dxmi_ext.DxMITrainer(networks(), algorithm, iterations=iterations, seed=0)
        dxmi_ext.fit(learns, make, output=tmp_path)

    unknown = dxmi_ext.shuffled(DATA + 1, 8).__call__  # without a fingerprint
    fit(unknown, 2)
    fit(batches(), 3)
    for iterations in (3, 4):  # finished, and to continue
        with pytest.raises(dxmi_ext.ConfigError, match=r"data must be what .* got data with another finger"):
            fit(dxmi_ext.shuffled(DATA + 1, 8), iterations)
    fit(batches(), 4)
    fit(unknown, 5)


def test_data_that_are_not_finite_are_refused() -> None:
    rows = torch.zeros(6, 3)
    rows[4:, 1] = math.nan
    with pytest.raises(dxmi_ext.ConfigError, match="data must be finite, got nan in row 4"):
        dxmi_ext.shuffled(rows, 2)


def test_state_dict_continues_the_same_run(tmp_path: Path) -> None:
    """A user's own checkpoints, by torch.save."""
    whole, half, other = trainer(), trainer(), trainer()
    for i in range(ITERATIONS):
        whole.step(batches()(i))
        if i < 3:
            half.step(batches()(i))
    torch.save(half.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for i in range(other.iteration, ITERATIONS):
        other.step(batches()(i))
    assert same(whole.networks, other.networks) and same(whole.averaged, other.averaged)
    with pytest.raises(dxmi_ext.ConfigError, match=f"iterations must be > {ITERATIONS} to train further"):
        other.step(batches()(0))
    state = {name: part for name, part in half.state_dict().items() if name != "averaged"}
    with pytest.raises(dxmi_ext.CheckpointError, match="state of a DxMITrainer must have averaged, got iter"):
        trainer().load_state_dict(state)
    with pytest.raises(dxmi_ext.ConfigError, match=r"data of shape \[B, 3\], B >= 1, got \[8, 2\]"):
        trainer().step(DATA[:8, :2])


def test_load_says_what_does_not_fit(tmp_path: Path) -> None:
    made, path = networks(), tmp_path / "saved"
    dxmi_ext.save(path, made, data="points")
    dxmi_ext.save(path, made)  # replaces the first
    assert sorted(files.name for files in path.iterdir()) == ["config.json", "model.safetensors"]
    wider = networks(width=5)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(dxmi_ext.CheckpointError, match=r"linear.weight has shape \[3, 3\], .* \[5, 3\]"):
        dxmi_ext.load(path, wider)
    with pytest.raises(dxmi_ext.CheckpointError, match=r"it has .*, which the networks lack"):
        dxmi_ext.load(path, made.value)
    dxmi_ext.save(tmp_path / "value", made.value)
    with pytest.raises(dxmi_ext.CheckpointError, match=r"it lacks sampler.log_std.* and \d+ more"):
        dxmi_ext.load(tmp_path / "value", wider)
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())
    (path / "config.json").write_text("[]")
    with pytest.raises(dxmi_ext.CheckpointError, match=r"config.json: expected a JSON object, got list"):
        dxmi_ext.load(path, made)
    (path / "model.safetensors").write_bytes(b"no tensors")
    for wrong, what in ((path, "missing or corrupt"), (tmp_path / "absent", "a folder of saved networks")):
        with pytest.raises(dxmi_ext.CheckpointError, match=what):
            dxmi_ext.load(wrong, made)


class WithState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="networks must have no state but tensors, got _extra_state, a dict"):
        dxmi_ext.save(tmp_path / "saved", WithState(2, 2))
    levels = dxmi_ext.uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
    with pytest.raises(dxmi_ext.ConfigError, match="no state but tensors, got _extra_state"):
        dxmi_ext.Pretrainer(WithState(2, 2), levels, lr=1e-3, iterations=1, seed=0)
    assert not [*tmp_path.iterdir()]


def test_save_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):
        dxmi_ext.save(tmp_path / "link", networks())
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_save_replaces_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    save_file({"weight": torch.zeros(2)}, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    others = "which holds a model that another library saved"
    for path, what in (("mine", "notes.txt"), ("file", "which is a file"), ("vit", others)):
        with pytest.raises(folders.FolderError, match=what):
            dxmi_ext.save(tmp_path / path, networks())
