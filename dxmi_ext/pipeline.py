"""A trained sampler as diffusers' scheduler and pipeline, for use without the trainer.

``DxMIPipeline.from_pretrained(folder)`` loads a saved pipeline, and so does ``DiffusionPipeline`` after this
module is imported, since diffusers only looks for the class among its own attributes. Without the import,
``custom_pipeline="pipeline", trust_remote_code=True`` makes it run the folder's pipeline.py, which imports
this module. Imports torch, diffusers, ``dxmi_ext.ops``, ``dxmi_ext.method.schedules`` and
``dxmi_ext.method.sampler``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn import functional as F

from dxmi_ext import ops
from dxmi_ext.engine.arguments import at_least, of_type
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.method.sampler import GaussianSampler, Timed, per_row
from dxmi_ext.method.schedules import Schedule

_LOADER = '''"""Registers dxmi_ext's pipeline with diffusers:

DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipeline", trust_remote_code=True)
"""

from dxmi_ext.pipeline import DxMIPipeline  # noqa: F401
'''
TABLES = ("sample_coef", "output_coef", "log_std", "time", "input_scale")


@dataclass
class DxMISchedulerOutput(BaseOutput):
    """One step."""

    prev_sample: Tensor
    """x_{t+1} [N, *]; "prev", since diffusers counts time from data to noise."""
    log_prob: Tensor
    """[N]: mean over D of log pi(x_{t+1} | x_t)."""


class DxMIScheduler(SchedulerMixin, ConfigMixin):
    """The T steps of a sampler: x_{t+1} = sample_coef[t] x_t + output_coef[t] output + exp(log_std[t]) z.

    Its config has the tables [T] with the trained sigmas, saved in scheduler_config.json. The noise z is the
    same as `GaussianSampler`'s for the same key.

    Args:
        sample_coef, output_coef, log_std: coefficients of the steps.
        time: the network's timesteps, all distinct.
        input_scale: factors of the network's input.
        initial_std: standard deviation of x_0.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sample_coef: Sequence[float],
        output_coef: Sequence[float],
        log_std: Sequence[float],
        time: Sequence[float],
        input_scale: Sequence[float],
        initial_std: float = 1.0,
    ) -> None:
        given = dict(zip(TABLES, (sample_coef, output_coef, log_std, time, input_scale), strict=True))
        steps = max(1, len(log_std))
        for name, table in given.items():
            if len(table) != steps:
                raise ValueError(f"{name} must have {steps} values, one for each step, got {len(table)}")
        self._tables = torch.tensor(list(given.values()), dtype=torch.float64)
        self.init_noise_sigma = initial_std
        self.timesteps = self._tables[3].float()
        if len(self.timesteps.unique()) < len(self.timesteps):
            raise ValueError(f"time must have distinct values, got {time}")

    @classmethod
    def from_schedule(cls, schedule: Schedule) -> DxMIScheduler:
        """The scheduler of an untrained schedule."""
        tables = {name: getattr(schedule, name).tolist() for name in TABLES}
        return cls(**tables, initial_std=schedule.initial_std)

    @classmethod
    def from_sampler(cls, sampler: GaussianSampler) -> DxMIScheduler:
        """The scheduler of a trained sampler, whose network must be `Timed`.

        Raises:
            TypeError: the network is of another kind, for example clipped or conditioned on the step.
            ValueError: the sampler has chains of several lengths, or a ``start``.
        """
        if type(sampler.network) is not Timed:
            raise TypeError(
                f"sampler must have a Timed network, got {type(sampler.network).__name__}, "
                "which diffusers cannot express"
            )
        if type(sampler) is not GaussianSampler or sampler.start is not None:
            raise ValueError(
                "sampler must have one length and start from noise, got "
                f"{type(sampler).__name__}, start={sampler.start}"
            )
        coefs = (sampler.sample_coef, sampler.output_coef, sampler.log_std.detach())
        tables = (*coefs, sampler.network.time, sampler.network.input_scale)
        return cls(
            **{name: table.tolist() for name, table in zip(TABLES, tables, strict=True)},
            initial_std=sampler.initial_std,
        )

    def __len__(self) -> int:
        """T."""
        return len(self.timesteps)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Moves the timesteps to a device; the number of steps is fixed.

        Raises:
            ValueError: ``num_inference_steps`` is not T.
        """
        if num_inference_steps not in (None, len(self)):
            raise ValueError(
                f"num_inference_steps must be None or {len(self)}, the number of trained steps, "
                f"got {num_inference_steps}"
            )
        self._tables = self._tables.to(device)
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """The network's input for x_t: input_scale[t] sample, [N, *].

        Args:
            sample: x_t [N, *].
            timestep: see `step`.
        """
        scale = self._tables[4].to(sample)[self.steps_of(timestep, sample)]
        return per_row(scale, sample) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        *,
        key: Tensor | None = None,
        sample_offset: int = 0,
    ) -> DxMISchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t to x_{t+1}; differentiable in sample and model_output.

        Args:
            model_output: [N, *]; cast to sample's dtype.
            timestep: value in `timesteps`, or [N] of them, one per row.
            sample: x_t [N, *].
            generator: source of the noise key if ``key`` is None; None: torch's default generator.
            return_dict: False returns the tuple (prev_sample, log_prob).
            key: int64 [2], from `ops.noise_key`, the same for all steps of a path.
            sample_offset: global index of the first row.

        Raises:
            ValueError: ``timestep`` is not in `timesteps`.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample_coef, output_coef, log_std = self._tables[:3].to(sample.device, dtype)
        result = ops.sampler_step(
            sample,
            model_output.to(sample.dtype),
            self.steps_of(timestep, sample),
            sample_coef,
            output_coef,
            log_std,
            noise_key(key, generator, sample.device),
            sample_offset=sample_offset,
        )
        output = DxMISchedulerOutput(prev_sample=result.next_sample, log_prob=result.log_prob)
        return output if return_dict else output.to_tuple()

    def steps_of(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """The generation steps 0..T - 1 of timesteps, int64 [N], one per row."""
        n = len(sample)
        wanted = torch.as_tensor(timestep, device=sample.device).float()
        if wanted.ndim and wanted.shape != (n,):
            raise ValueError(f"timestep must be one value or one per row, [{n}], got shape {[*wanted.shape]}")
        same = wanted.expand(n)[:, None] == self.timesteps.to(sample.device)
        if not same.any(1).all():
            raise ValueError(
                f"timestep must be in scheduler.timesteps, {self.timesteps.tolist()}, got {timestep}"
            )
        return same.byte().argmax(1)


class DxMIPipeline(DiffusionPipeline):
    """Generates images in a few steps with a trained sampler.

    Args:
        unet: (x [N, C, H, W], timestep [N], class labels) -> the output, or an object that has it as
            ``sample``, with in_channels and sample_size in its config, such as `diffusers.UNet2DModel`.
        scheduler: scheduler of the steps.
        patch_size: side of the patches of pixels that the network takes as channels.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModelMixin, scheduler: DxMIScheduler, patch_size: int = 1) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        # In model_index.json: on the Hub, diffusers refuses components of libraries other than its own.
        self.register_to_config(scheduler=("diffusers", type(scheduler).__name__))
        self.register_to_config(patch_size=patch_size)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves model_index.json, unet/ and scheduler/, in json and safetensors, and a pipeline.py that
        imports this module. The arguments are those of `diffusers.DiffusionPipeline.save_pretrained`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(_LOADER, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Tensor | Sequence[int] | None = None,
        key: Tensor | None = None,
        sample_offset: int = 0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images, the same as `GaussianSampler.sample` for the same key.

        Args:
            batch_size: number of images N.
            generator: source of the noise key if ``key`` is None; None: torch's default generator.
            num_inference_steps: None or T.
            output_type: "pil"; "np", [N, H, W, C] in [0, 1]; "pt", [N, C, H, W] in [0, 1]; "raw", x_T itself.
            return_dict: False returns a tuple.
            class_labels: [N], for a conditional network.
            key: int64 [2], from `ops.noise_key`.
            sample_offset: global index of the first image; image i depends on (key, sample_offset + i) alone.
        """
        at_least("batch_size", batch_size, 1)
        if output_type not in ("pil", "np", "pt", "raw"):
            raise ValueError(f"output_type must be pil, np, pt or raw, got {output_type!r}")
        device, scheduler, network = self._execution_device, self.scheduler, self.unet
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=device)
        if labels is not None and labels.shape != (batch_size,):
            raise ValueError(
                f"class_labels must have shape [{batch_size}], one per image, got {[*labels.shape]}"
            )
        scheduler.set_timesteps(num_inference_steps, device=device)
        key = noise_key(key, generator, device)
        patch, size = self.config.patch_size, network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, network.config.in_channels // patch**2, height * patch, width * patch)
        # Steps are computed in float32 at least, whatever the network's dtype.
        dtype = torch.promote_types(network.dtype, torch.float32)
        x = scheduler.init_noise_sigma * ops.normal(shape, key, sample_offset=sample_offset, dtype=dtype)
        for time in self.progress_bar(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, time).to(network.dtype)
            patches = F.pixel_unshuffle(scaled, patch)
            output = call(network, patches, time.expand(batch_size), labels)
            output = F.pixel_shuffle(output, patch)
            x = scheduler.step(output, time, x, key=key, sample_offset=sample_offset).prev_sample
        self.maybe_free_model_hooks()
        images: Any = x
        if output_type != "raw":
            images = (x / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


# Where DiffusionPipeline.from_pretrained looks for the classes that model_index.json names.
diffusers.DxMIPipeline, diffusers.DxMIScheduler = DxMIPipeline, DxMIScheduler


def save_pretrained(
    folder: str | PathLike[str], unet: ModelMixin, sampler: GaussianSampler, patch_size: int = 1
) -> None:
    """Saves a sampler as a pipeline; see `DxMIPipeline.save_pretrained`.

    Args:
        folder: folder to create.
        unet: the network within `sampler.Timed`, from diffusers or compatible.
        sampler: the trained sampler, with a `Timed` network.
        patch_size: see `DxMIPipeline`.
    """
    DxMIPipeline(unet, DxMIScheduler.from_sampler(sampler), patch_size).save_pretrained(folder)


def noise_key(key: Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The given key, or one drawn from the generator, on the device."""
    if key is not None and generator is not None:
        raise ValueError("key must be None with a generator, got both")
    of_type("key", key, (Tensor, type(None)), "a tensor from noise_key or None")
    if isinstance(generator, list):
        raise TypeError(
            "generator must be a single one, got a list: a row's noise depends on its index already"
        )
    return (ops.noise_key(generator=generator) if key is None else key).to(device)
