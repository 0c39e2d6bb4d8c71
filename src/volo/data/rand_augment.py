"""RandAugment (Cubuk et al., arXiv 1909.13719) as timm words it: "rand-m9-mstd0.5-inc1".

Every geometric operation is one `affine` call on all inputs, so that whatever belongs to the image (a label map, a
mask) moves along if a kernel for it is registered with torchvision; other operations touch images only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

MAX_LEVEL = 10.0
"""Magnitude at which every operation has its full range."""


def _signed(value: float) -> float:
    return -value if torch.rand(()).item() < 0.5 else value


def _enhance(strength: float, increasing: bool) -> float:
    """Blend factor; 1 leaves the image as it is."""
    return max(0.1, 1 + _signed(strength * 0.9)) if increasing else strength * 1.8 + 0.1


def _solarize(image: Tensor, threshold: int) -> Tensor:
    return F.solarize(image, threshold) if threshold < 256 else image


def _solarize_add(image: Tensor, addition: int) -> Tensor:
    # Dark values (below 128) are lifted; 127 + 128 still fits into 8 bits.
    lifted = torch.where(image < 128, image + addition, image)
    return tv_tensors.wrap(lifted, like=image) if isinstance(image, tv_tensors.TVTensor) else lifted


@dataclass(frozen=True)
class Operation:
    """`argument` maps strength in 0..1 and `increasing` to the argument of `apply`; None: there is none.

    Geometric operations have no `apply`: their argument is that of `affine` (shear, translation or angle).
    """

    argument: Callable[[float, bool], Any] | None
    apply: Callable[..., Tensor] | None = None


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": Operation(None, F.autocontrast),
    "equalize": Operation(None, F.equalize),
    "invert": Operation(None, F.invert),
    "posterize": Operation(lambda s, inc: max(1, 4 - int(s * 4) if inc else int(s * 4)), F.posterize),
    "solarize": Operation(lambda s, inc: 256 - min(256, int(s * 256)) if inc else min(256, int(s * 256)), _solarize),
    "solarize_add": Operation(lambda s, inc: min(128, int(s * 110)), _solarize_add),
    "color": Operation(_enhance, F.adjust_saturation),
    "contrast": Operation(_enhance, F.adjust_contrast),
    "brightness": Operation(_enhance, F.adjust_brightness),
    "sharpness": Operation(_enhance, F.adjust_sharpness),
    "rotate": Operation(lambda s, inc: _signed(s * 30.0)),
    "shear_x": Operation(lambda s, inc: _signed(s * 0.3)),
    "shear_y": Operation(lambda s, inc: _signed(s * 0.3)),
    "translate_x": Operation(lambda s, inc: _signed(s * 0.45)),
    "translate_y": Operation(lambda s, inc: _signed(s * 0.45)),
}
"""timm's 15 operations; ranges at strength 1: 30 degrees, shear 0.3, translation 0.45 of the side, blend 0.1 to 1.9.

One difference: posterize keeps at least one bit, where timm's 0 bits make the image black (and newer Pillow fail).
"""


class RandAugment(v2.Transform):
    """`num_layers` operations, drawn with replacement, each applied with probability `prob` at about `magnitude` of 10.

    The magnitude is drawn anew for each from a normal distribution of deviation `magnitude_std` (uniform from 0 to
    `magnitude` when that is infinite) and clipped to 0..`magnitude_max`. `increasing`: every operation gets stronger
    with magnitude. `fill` (per channel, 0..255) moves into images from outside, zero into anything else. Draws come
    from torch's CPU generator.
    """

    def __init__(
        self,
        magnitude: float = 9.0,
        *,
        magnitude_std: float = 0.5,
        magnitude_max: float = MAX_LEVEL,
        num_layers: int = 2,
        prob: float = 0.5,
        increasing: bool = True,
        fill: Sequence[float] = (128, 128, 128),
    ) -> None:
        super().__init__()
        self.magnitude, self.magnitude_std, self.magnitude_max = magnitude, magnitude_std, magnitude_max
        self.num_layers, self.prob, self.increasing, self.fill = num_layers, prob, increasing, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        names = list(OPERATIONS)
        chosen = []
        for draw, chance in zip(
            torch.randint(len(names), (self.num_layers,)).tolist(), torch.rand(self.num_layers).tolist()
        ):
            if chance < self.prob:
                operation = OPERATIONS[names[draw]]
                argument = operation.argument and operation.argument(self._level() / MAX_LEVEL, self.increasing)
                chosen.append((names[draw], argument))
        return {"chosen": chosen}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        is_picture = type(inpt) is Tensor or isinstance(inpt, tv_tensors.Image)
        for name, argument in params["chosen"]:
            apply = OPERATIONS[name].apply
            if apply is None:
                inpt = move(inpt, name, argument, self.fill if is_picture else None)
            elif is_picture:
                inpt = apply(inpt) if argument is None else apply(inpt, argument)
        return inpt

    def _level(self) -> float:
        if math.isinf(self.magnitude_std):
            level = torch.rand(()).item() * self.magnitude
        else:
            level = self.magnitude + torch.randn(()).item() * self.magnitude_std
        return min(max(level, 0.0), self.magnitude_max)


def move(inpt: Any, name: str, amount: float, fill: Sequence[float] | None) -> Any:
    """One of the geometric OPERATIONS: degrees for "rotate", tangent for a shear, share of the side for a translation.

    Shears keep the top left corner in place, rotations the centre. Raises TypeError for a tv_tensor without an affine
    kernel: what cannot move along must not stay behind.
    """
    if amount == 0:
        return inpt
    is_picture = type(inpt) is Tensor or isinstance(inpt, tv_tensors.Image)
    if is_picture and fill is not None and inpt.dtype == torch.uint8 and inpt.ndim == 3 and len(inpt) == len(fill):
        moved = _move_pixels(inpt.as_subclass(Tensor), name, amount, fill)
        return tv_tensors.wrap(moved, like=inpt) if isinstance(inpt, tv_tensors.Image) else moved
    height, width = F.get_size(inpt)
    angle, translate, shear, center = 0.0, [0.0, 0.0], [0.0, 0.0], None
    if name == "rotate":
        angle = amount
    elif name == "translate_x":
        translate = [amount * width, 0.0]
    elif name == "translate_y":
        translate = [0.0, amount * height]
    elif name == "shear_x":
        shear, center = [math.degrees(math.atan(amount)), 0.0], [0.0, 0.0]
    else:
        shear, center = [0.0, math.degrees(math.atan(amount))], [0.0, 0.0]
    return F.affine(
        inpt,
        angle=angle,
        translate=translate,
        scale=1.0,
        shear=shear,
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=fill and list(fill),
        center=center,
    )


def _move_pixels(image: Tensor, name: str, amount: float, fill: Sequence[float]) -> Tensor:
    """`move` for an image, uint8 [C, H, W], as `F.affine` does it but twice as fast; at the edge it blends with the fill
    as if the image lay on a canvas of that colour, where `F.affine` darkens the seam.
    """
    H, W = image.shape[1:]
    # Where a pixel comes from, in grid_sample's coordinates: -1 to 1 over the image, pixel centres inside.
    x = torch.arange(1 - W, W, 2, dtype=torch.float32) / W  # [W]
    y = torch.arange(1 - H, H, 2, dtype=torch.float32)[:, None] / H  # [H, 1]
    from_x, from_y = x, y
    if name == "rotate":
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        from_x, from_y = cos * x + sin * (H / W) * y, cos * y - sin * (W / H) * x
    elif name == "translate_x":
        from_x = x - 2 * amount
    elif name == "translate_y":
        from_y = y - 2 * amount
    elif name == "shear_x":
        from_x = x + amount * (H / W) * (y + 1)
    else:
        from_y = y + amount * (W / H) * (x + 1)
    grid = torch.empty(1, H, W, 2)
    grid[0, :, :, 0], grid[0, :, :, 1] = from_x, from_y
    # grid_sample reads zero outside: colours relative to the fill make that the fill, without a mask.
    colour = torch.tensor(fill, dtype=torch.float32)[:, None, None]
    relative = image.to(torch.float32).sub_(colour)[None]
    moved = grid_sample(relative, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved[0].add_(colour).round_().to(torch.uint8)


def parse_rand_augment(spec: str, fill: Sequence[float] = (128, 128, 128)) -> RandAugment:
    """`RandAugment` from timm's words: "rand" and, in any order, m (magnitude), n (layers), p, mstd, mmax and inc.

    Without them timm's defaults hold: m10, n2, p0.5, mstd0, mmax10, inc0. Raises ValueError for anything else.
    """
    allowed = "rand-m9-mstd0.5-inc1, made of m (magnitude), n (layers), p (probability), mstd, mmax, inc (0 or 1)"
    head, *sections = spec.split("-")
    values = {"m": MAX_LEVEL, "n": 2.0, "p": 0.5, "mstd": 0.0, "mmax": MAX_LEVEL, "inc": 0.0}
    if head != "rand":
        raise ValueError(f"augment.rand_augment is {spec!r}; it looks like {allowed}")
    for section in sections:
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+\.?\d*|\.\d+|inf)", section)
        if not match:
            raise ValueError(
                f"augment.rand_augment is {spec!r}; {section!r} is not understood. It looks like {allowed}"
            )
        values[match[1]] = float(match[2])
    if not 0 <= values["p"] <= 1 or values["n"] % 1 or values["inc"] not in (0, 1) or math.isinf(values["m"]):
        raise ValueError(f"augment.rand_augment is {spec!r}; p is from 0 to 1, n a whole number, inc 0 or 1, m finite")
    return RandAugment(
        values["m"],
        magnitude_std=math.inf if values["mstd"] > 100 else values["mstd"],
        magnitude_max=values["mmax"],
        num_layers=int(values["n"]),
        prob=values["p"],
        increasing=bool(values["inc"]),
        fill=fill,
    )
