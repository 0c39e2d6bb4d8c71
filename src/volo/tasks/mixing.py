"""Mixing two images of a batch: mixup, CutMix, and MixToken, which mixes tokens instead of pixels.

Every image is mixed with the one at the mirrored place in the batch (`flip(0)`), one box or one share a batch, as
in the original. What is drawn is never branched on, and a box is a mask rather than four integers: a compiled task
compiles once, into one graph. All draws come from torch's global generator, which the backend seeds anew in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta

from volo.models.volo import VOLO


def draw_share(alpha: float, device: torch.device | None = None) -> Tensor:
    """lam ~ Beta(alpha, alpha), a 0-d float32 tensor on `device`."""
    both = torch.full((), alpha)
    return Beta(both, both, validate_args=False).sample().to(device)


def draw_box(height: int, width: int, alpha: float, device: torch.device | None = None) -> Tensor:
    """A random box as a bool mask [height, width]: its area is about 1 - lam, lam ~ Beta(alpha, alpha) (CutMix).

    The centre is uniform over the grid, and the box is clipped at the edges.
    """
    side = (1.0 - draw_share(alpha)).sqrt()
    centre = torch.rand(2)

    def inside(length: int, c: Tensor) -> Tensor:
        half = (length * side).floor().div(2, rounding_mode="floor")
        middle = (c * length).floor()
        places = torch.arange(length)
        return (places >= (middle - half)) & (places < (middle + half))

    return (inside(height, centre[0])[:, None] & inside(width, centre[1])[None, :]).to(device)


def mix_inside(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, H, W, C] with the places of `mask` [H, W] taken from the batch in reverse order.

    Its own inverse: applied to the result with the same mask it puts everything back.
    """
    return torch.where(mask[:, :, None], x.flip(0), x)


def enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    """[h, w] -> [h * factor, w * factor], every place repeated."""
    return mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def restore_tokens(token_logits: Tensor, mask: Tensor) -> Tensor:
    """Token logits [B, h*w, K] of a batch mixed with `mask` [h, w], put back to the images they came from."""
    grid = token_logits.unflatten(1, tuple(mask.shape))
    return mix_inside(grid, mask).flatten(1, 2)


class MixedLogits(NamedTuple):
    """What a VOLO says of a batch whose fine tokens were mixed."""

    output: Tensor
    """Joined logits [B, K], of the mixed images; `model.forward` where nothing was mixed."""
    class_logits: Tensor
    """[B, K], of the mixed images."""
    token_logits: Tensor
    """[B, N, K], put back to the images that the tokens came from."""
    lam: Tensor | float
    """Share of each image's own tokens."""


def mix_token(model: VOLO, images: Tensor, alpha: float) -> MixedLogits:
    """Run `model` with MixToken (arXiv 2104.10858): one box a batch, drawn on the stage-2 grid with Beta(alpha, alpha);
    inside it the fine tokens come from the batch in reverse order. alpha 0: nothing is mixed and nothing drawn."""
    fine = model.forward_embed(images)
    mask = None
    if alpha > 0:
        mask = draw_box(fine.shape[1] // 2, fine.shape[2] // 2, alpha, fine.device)
        fine = mix_inside(fine, enlarge_mask(mask, 2))
    class_logits, token_logits = model.class_and_token_logits(model.forward_tokens(fine))
    output = model.combine_logits(class_logits, token_logits)
    if mask is None:
        return MixedLogits(output, class_logits, token_logits, 1.0)
    return MixedLogits(output, class_logits, restore_tokens(token_logits, mask), 1.0 - mask.float().mean())


def mix_pixels(images: Tensor, target: Tensor, mixup: float, cutmix: float, prob: float) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and soft targets [B, K] mixed by mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), either
    with equal chance where both parameters are above 0, and with probability `prob` at all."""
    H, W = images.shape[2:]
    if cutmix > 0:
        own = 1.0 - draw_box(H, W, cutmix).float()  # share of each place's own pixel
        if mixup > 0:
            own = torch.where(torch.rand(()) < 0.5, own, draw_share(mixup))
    else:
        own = draw_share(mixup).expand(H, W)
    own = torch.where(torch.rand(()) < prob, own, 1.0).to(images.device)
    mixed = own.to(images.dtype) * images + (1.0 - own).to(images.dtype) * images.flip(0)
    return mixed, mix_targets(target, own.mean())


def mix_targets(target: Tensor, lam: Tensor | float) -> Tensor:
    """Soft targets [B, K]: lam of each image's own, 1 - lam of its partner's."""
    return lam * target + (1.0 - lam) * target.flip(0)


def smooth_one_hot(target: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Class indices [B] -> soft targets [B, K]; soft targets [B, K] come back smoothed by the same rule."""
    hard = F.one_hot(target, num_classes).float() if target.dim() == 1 else target.float()
    return hard * (1.0 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all leading dimensions of the cross-entropy against soft targets; both [..., K], computed in float32."""
    return torch.sum(-target * F.log_softmax(logits.float(), dim=-1), dim=-1).mean()
