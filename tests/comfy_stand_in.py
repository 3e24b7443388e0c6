"""A stand-in of what ComfyUI offers to a node that makes a MODEL, written from its published signatures.

Names, arguments and conventions are those of comfy.supported_models, model_base, model_patcher, model_management,
conds and folder_paths. A network is never made (`disable_unet_model_creation`), which is the way that ComfyUI has for
models whose network is another program's.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ModelType(enum.Enum):
    EPS = 1
    V_PREDICTION = 2
    FLOW = 6
    FLUX = 8


class CONDRegular:
    """A condition [1 or batch, ...]."""

    def __init__(self, cond: Tensor):
        self.cond = cond


class Config:
    """A class of comfy.supported_models."""

    sampling_settings: ClassVar[dict[str, Any]] = {}
    manual_cast_dtype = None

    def __init__(self, unet_config: dict[str, Any]):
        self.unet_config = dict(unet_config)


class FlowConfig(Config):
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 3.0}


class Noise:
    """Discrete steps of a variance-preserving schedule: epsilon or v."""

    def __init__(self, settings: dict[str, Any], velocity: bool):
        low, high = settings.get("linear_start", 0.00085), settings.get("linear_end", 0.012)
        steps = settings.get("timesteps", 1000)
        betas = torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2
        if settings.get("beta_schedule") == "sqrt_linear":
            betas = torch.linspace(low, high, steps, dtype=torch.float64)
        kept = (1 - betas).cumprod(0)
        self.sigmas, self.velocity = ((1 - kept) / kept).sqrt().float(), velocity

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log()[:, None] - self.sigmas.log()).abs().argmin(1)

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (column(sigma) ** 2 + 1).sqrt()

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        s = column(sigma)
        if self.velocity:
            return x / (s**2 + 1) - output * s / (s**2 + 1).sqrt()
        return x - output * s


class Flow:
    """A straight path from noise to picture; the network is given `scale` times sigma."""

    def __init__(self, settings: dict[str, Any], scale: float):
        self.shift, self.scale = settings.get("shift"), settings.get("multiplier", scale)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.scale

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        del sigma
        return x

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * column(sigma)


def column(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None]


def sampling(config: Config, kind: ModelType) -> Noise | Flow:
    if kind in (ModelType.EPS, ModelType.V_PREDICTION):
        return Noise(config.sampling_settings, kind is ModelType.V_PREDICTION)
    return Flow(config.sampling_settings, 1.0 if kind is ModelType.FLUX else 1000.0)


class BaseModel(nn.Module):
    """comfy.model_base.BaseModel."""

    diffusion_model: Any

    def __init__(self, model_config: Config, model_type: ModelType = ModelType.EPS, device: Any = None):
        super().__init__()
        assert model_config.unet_config["disable_unet_model_creation"]
        self.model_config, self.device = model_config, device
        self.model_sampling = sampling(model_config, model_type)

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The picture that the network sees in `x` at noise `t` (sigma), both of one batch."""
        assert c_concat is None
        dtype = self.diffusion_model.dtype
        given = {k: v if v.dtype in (torch.int32, torch.int64) else v.to(dtype) for k, v in kwargs.items()}
        output = self.diffusion_model(
            self.model_sampling.calculate_input(t, x).to(dtype),
            self.model_sampling.timestep(t).float(),
            context=None if c_crossattn is None else c_crossattn.to(dtype),
            control=control,
            transformer_options=dict(transformer_options or {}),
            **given,
        )
        return self.model_sampling.calculate_denoised(t, output.float(), x)

    def encode_adm(self, **kwargs: Any) -> Tensor | None:
        del kwargs
        return None

    def extra_conds(self, **kwargs: Any) -> dict[str, CONDRegular]:
        found = {"c_crossattn": CONDRegular(kwargs["cross_attn"])}
        if (y := self.encode_adm(**kwargs)) is not None:
            found["y"] = CONDRegular(y)
        return found


class SDXL(BaseModel):
    def encode_adm(self, **kwargs: Any) -> Tensor:
        pooled: Tensor = kwargs["pooled_output"]
        return torch.cat([pooled, torch.zeros(len(pooled), 6 * 256)], dim=1)  # the sizes, embedded


class SD3(BaseModel):
    def __init__(self, model_config: Config, model_type: ModelType = ModelType.FLOW, device: Any = None):
        super().__init__(model_config, model_type, device)

    def encode_adm(self, **kwargs: Any) -> Any:
        return kwargs["pooled_output"]


class Flux(SD3):
    def __init__(self, model_config: Config, model_type: ModelType = ModelType.FLUX, device: Any = None):
        super().__init__(model_config, model_type, device)
        assert model_config.unet_config["in_channels"] <= model_config.unet_config["out_channels"]

    def extra_conds(self, **kwargs: Any) -> dict[str, CONDRegular]:
        found = super().extra_conds(**kwargs)
        return {**found, "guidance": CONDRegular(torch.FloatTensor([kwargs.get("guidance", 3.5)]))}


class ModelPatcher:
    def __init__(self, model: nn.Module, load_device: Any, offload_device: Any, size: int = 0):
        self.model, self.load_device, self.offload_device, self.size = (
            model,
            load_device,
            offload_device,
            size,
        )

    def load(self) -> nn.Module:
        """As before and after sampling: the model is moved there and back."""
        return self.model.to(self.offload_device).to(self.load_device)


freed: list[tuple[int, Any]] = []
"""What free_memory was asked for."""


@contextmanager
def installed(models: Path) -> Iterator[None]:
    """The modules of ComfyUI in sys.modules, whose models folder is `models`."""
    cpu = torch.device("cpu")
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.conds": {"CONDRegular": CONDRegular},
        "comfy.model_base": {
            "ModelType": ModelType,
            **{c.__name__: c for c in (BaseModel, SDXL, SD3, Flux)},
        },
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "free_memory": lambda required, device, keep_loaded=(): freed.append((required, device)),
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.supported_models": {
            **dict.fromkeys(("SD15", "SD20", "SDXL", "Flux"), Config),
            "SD3": FlowConfig,
            "FluxSchnell": type("FluxSchnell", (Config,), {"sampling_settings": {"multiplier": 1.0}}),
        },
        "folder_paths": {"models_dir": str(models)},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(made[name]).update(content)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, made[name])
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
