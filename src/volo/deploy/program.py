"""From a model to the program that every format is written from."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from volo.config import DataConfig
from volo.data.transforms import ResizeAndCenterCrop
from volo.inference.exported import named_outputs
from volo.layers import OutlookAttention, PatchEmbed
from volo.models.fuse import fuse
from volo.models.volo import VOLO, resample_pos_embed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """What a program takes: images [batch, channels, height, width], or pixels [batch, height, width, 3]."""

    height: int
    width: int
    batch: int = 1
    """Of a file whose batch is fixed."""
    free: frozenset[str] = frozenset({"batch"})
    """What one file leaves open: "batch", "size"."""
    multiple: int = 1
    """Height and width are multiples of it."""
    channels: int = 3


def prepare(model: nn.Module, *, portable: bool = True) -> nn.Module:
    """A copy of `model` on the CPU in float32 and eval mode: BatchNorms of the stem folded, the scale of outlook attention
    multiplied into its Linear layer. `portable`: attention in operations that every runtime has, timm's included
    (`volo.fuse`); else by unfold and fold."""
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    if portable:
        fuse(model, portable=True)
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            module.fold_batch_norm()
        if isinstance(module, OutlookAttention):
            module.portable = portable
            if type(module.attn) is nn.Linear:
                module.attn.weight.mul_(module.scale)
                if module.attn.bias is not None:
                    module.attn.bias.mul_(module.scale)
                module.scale = 1.0
    return model


def at_size(model: nn.Module, height: int, width: int) -> nn.Module:
    """`model`, changed so that its position embeddings are those of images of this size: no graph has to resample them."""
    for module in model.modules():
        if isinstance(module, VOLO):
            grid = dataclasses.replace(module.config, img_size=(height, width)).grid_size
            if module.pos_embed.shape[1:3] != grid:
                module.pos_embed = nn.Parameter(resample_pos_embed(module.pos_embed, grid), requires_grad=False)
    return model


class InDtype(nn.Module):
    """A model that computes in 16 bits behind inputs and outputs in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        given = self.model(images.to(self.dtype))
        if isinstance(given, Tensor):
            return given.float()
        return {name: output.float() for name, output in named_outputs(given).items()}


class WithTokens(nn.Module):
    """A VOLO that gives, besides its logits, what each token says: [B, h * w, num_classes]."""

    def __init__(self, model: VOLO) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        class_logits, token_logits = self.model.class_and_token_logits(self.model.forward_features(images))
        return {"logits": self.model.combine_logits(class_logits, token_logits), "tokens": token_logits}


class WithPreprocessing(nn.Module):
    """uint8 pixels [B, H, W, 3] of any size -> probabilities of all that `model` gives logits of: resized, cropped and normalised as `volo predict`
    does it (`ResizeAndCenterCrop`, then `PixelPipeline`), up to one grey level.

    Resizing and cropping are one matrix for each axis, so that no runtime has to know an antialiased Resize.
    """

    def __init__(self, model: nn.Module, data: DataConfig) -> None:
        super().__init__()
        self.model = model
        crop = ResizeAndCenterCrop(data.img_size, data.crop_pct, data.interpolation)
        self.size, self.cover = crop.size, crop.cover
        self.is_bicubic = data.interpolation != "bilinear"
        mean, std = torch.tensor(data.mean), torch.tensor(data.std)
        self.register_buffer("factor", (1 / (255 * std)).view(3, 1, 1))
        self.register_buffer("offset", (-mean / std).view(3, 1, 1))

    factor: Tensor
    offset: Tensor

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        H, W = pixels.shape[1:3]
        sides = [torch.ones(n, dtype=torch.int64).sum() for n in (H, W)]
        most = ResizeAndCenterCrop.MAX_ASPECT * torch.minimum(*sides)  # of a longer image the middle is seen
        height, width = (torch.minimum(side, most) for side in sides)
        # The factor by which both sides are covered, as a fraction: cover / side of the axis that needs the larger one.
        is_rows = self.cover[0] * width >= self.cover[1] * height
        above = torch.where(is_rows, self.cover[0], self.cover[1])
        below = torch.where(is_rows, height, width)
        rows, columns = (
            self._axis(n, torch.div(above * length, below, rounding_mode="floor"), length, size, side - length)
            for n, length, size, side in ((H, height, self.size[0], sides[0]), (W, width, self.size[1], sides[1]))
        )
        x = pixels.permute(0, 3, 1, 2).float()
        # Whole levels after each axis, columns first, as the kernel for uint8 has it.
        x = (x @ columns.T + 0.5).floor().clamp(0, 255)
        x = (rows @ x + 0.5).floor().clamp(0, 255)
        outputs = named_outputs(self.model(x * self.factor + self.offset))
        return tuple(logits.softmax(dim=-1) for logits in outputs.values())

    def _axis(self, n: Any, scaled: Tensor, length: Tensor, size: int, left_out: Tensor) -> Tensor:
        """[size, n]: what each pixel of the crop takes from an axis of n pixels, the middle `length` of which (all but
        `left_out`) are resized to `scaled`."""
        # torchvision's rounding: half to even where something is cut off, down where black is added.
        cut = ((scaled - size).float() / 2).round()
        first = torch.where(scaled >= size, cut, -torch.div(size - scaled, 2, rounding_mode="floor").float())
        i = torch.arange(size).float() + first
        scale = length.float() / scaled.float()
        wide = scale.clamp(min=1.0)
        j = torch.arange(n).float() - (left_out.float() / 2).round()
        d = ((j[None] + 0.5 - (i[:, None] + 0.5) * scale) / wide).abs()
        if self.is_bicubic:  # a = -0.5
            near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
            weights = torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
        else:
            weights = (1 - d).clamp(min=0)
        weights = weights * ((j >= 0) & (j < length)).float()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
        return torch.where(((i >= 0) & (i < scaled))[:, None], weights, torch.zeros_like(weights))


def make_program(module: nn.Module, shape: Shape, *, pixels: bool = False) -> ExportedProgram:
    """torch.export of `module`, with what `shape` leaves open as symbols. Raises ValueError where it cannot be exported."""
    batch = 2 if "batch" in shape.free else shape.batch  # an example of one would be taken for a rule
    dims: dict[int, Any] = {0: Dim("batch", min=1, max=4096)} if "batch" in shape.free else {}
    height, width = shape.height, shape.width
    if pixels:
        example = torch.zeros(batch, height + 7, width + 18, 3, dtype=torch.uint8)
        dims |= {1: Dim("height", min=2, max=32768), 2: Dim("width", min=2, max=32768)}
    else:
        if "size" in shape.free:
            m = shape.multiple
            width += m  # height and width are not one symbol
            dims |= {2: m * Dim("rows", min=2, max=512), 3: m * Dim("columns", min=2, max=512)}
        example = torch.zeros(batch, shape.channels, height, width)
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), (example,), dynamic_shapes=(dims,) if dims else None)
    except Exception as error:
        kinds = ", ".join(sorted(shape.free)) or "nothing"
        raise ValueError(
            f"{type(module).__name__} cannot be exported with {kinds} left free: {str(error).splitlines()[0]}. "
            "Try --dynamic batch, or --dynamic none"
        ) from error
