"""Any classifier as an annotator: its own head, applied to each position of its last feature map.

Token labeling (arXiv 2104.10858) takes the label of a position from what the head says when it sees that position
alone. For a network that pools by averaging and ends in a linear layer, the mean of these logits over all positions is
the network's own answer; elsewhere it is close to it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from volo.config import AnnotatorConfig, Size
from volo.data.transforms import height_width
from volo.inference.exported import is_exported
from volo.inference.model_source import LoadedModel, load
from volo.models.volo import VOLO

MAX_LOGITS = 1 << 26
"""No more logits than this are held at once while the best are picked: 256 MiB."""


@dataclass(frozen=True)
class Layout:
    """How the head of a classifier takes a feature map: [B, N, C] with class and register tokens before the positions,
    [B, h, w, C] or [B, C, h, w]."""

    kind: Literal["tokens", "NHWC", "NCHW"]
    num_prefix: int = 0
    """Tokens that are no position."""


class Annotator(nn.Module):
    """`forward(images [B, 3, H, W]) -> logits [B, h, w, num_classes]`, from a VOLO or a timm classifier.

    VOLO (ours and timm's) has a head for tokens, `aux_head`. Of any other model a position is shown to `forward_head` as
    if it were the whole feature map, so that norms, hidden layers and activations of the head take part and pooling
    changes nothing. Of a transformer's output the class and register tokens are left out, and the position takes the
    place of all that the head looks at.
    """

    def __init__(self, classifier: nn.Module) -> None:
        """Raises ValueError for a model without `forward_features` and `forward_head`, or without classes."""
        super().__init__()
        self.classifier = classifier
        self.num_classes: int = getattr(classifier, "num_classes", 0)
        if not self.num_classes:
            raise ValueError(f"an annotator needs classes, but this {type(classifier).__name__} has none")
        if not hasattr(classifier, "forward_features") or not hasattr(classifier, "forward_head"):
            raise ValueError(
                f"{type(classifier).__name__} has no forward_features and forward_head, by which its positions could be "
                "classified; take a VOLO or a model of timm"
            )
        self.aux_head = getattr(classifier, "aux_head", None)

    def features(self, images: Tensor) -> tuple[Tensor, Layout]:
        """images [B, 3, H, W] -> what the head sees, [B, h, w, C], and how the head takes it. Raises ValueError for a model
        without a grid."""
        x = self.classifier.forward_features(images)  # type: ignore[operator]
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            raise ValueError(
                f"{type(self.classifier).__name__} has several feature maps, or none; take another annotator"
            )
        if x.dim() == 3:
            num_prefix, h, w = self._token_grid(x.shape[1], *images.shape[-2:])
            return x[:, num_prefix:].unflatten(1, (h, w)), Layout("tokens", num_prefix)
        width = getattr(self.classifier, "num_features", None)
        declared = str(getattr(self.classifier, "output_fmt", ""))
        if declared.endswith("NHWC") or (x.shape[1] != width and x.shape[3] == width):
            return x, Layout("NHWC")
        return x.permute(0, 2, 3, 1), Layout("NCHW")

    def classify(self, features: Tensor, layout: Layout) -> Tensor:
        """features [..., C], laid out for the head as `features` says -> logits [..., num_classes], each position for
        itself."""
        x = features.reshape(-1, features.shape[-1])
        if self._has_token_head:
            logits = self.aux_head(x)  # type: ignore[misc]
        else:
            if layout.kind == "tokens":
                # As many equal tokens as the head tells apart: class, distillation and register tokens, and one more.
                x = x[:, None].expand(-1, layout.num_prefix + 1, -1)
            else:
                x = x[:, None, None] if layout.kind == "NHWC" else x[:, :, None, None]
            logits = self.classifier.forward_head(x)  # type: ignore[operator]
        return logits.unflatten(0, features.shape[:-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(*self.features(images))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of an image of that size."""
        device = next(self.parameters()).device
        with torch.inference_mode(), device:  # forward passes may make tensors of their own
            rows, columns = self.features(torch.zeros(1, 3, height, width))[0].shape[1:3]
        return rows, columns

    @property
    def _has_token_head(self) -> bool:
        return isinstance(self.aux_head, nn.Linear)

    def _token_grid(self, num_tokens: int, height: int, width: int) -> tuple[int, int, int]:
        """(tokens that are no position, rows, columns)."""
        known = 1 if self._has_token_head else getattr(self.classifier, "num_prefix_tokens", None)
        for num_prefix in (0, 1, 2) if known is None else (known,):
            for stride in range(1, max(height, width) + 1):
                for h, w in ((height // stride, width // stride), (-(-height // stride), -(-width // stride))):
                    if h * w == num_tokens - num_prefix:
                        return num_prefix, h, w
        raise ValueError(
            f"the {num_tokens} tokens of {type(self.classifier).__name__} are no grid over an image of {height} x {width}; "
            "take another annotator"
        )


@dataclass(frozen=True)
class Drawing:
    """What an annotator says about a batch."""

    scores: Tensor
    """The best logits of each position, falling: float32 [B, top, h, w]; see `draw_label_maps` for where zero is."""
    classes: Tensor
    """Their classes: int64 [B, top, h, w]."""
    mean_logits: Tensor
    """Logits of the whole image, the mean over positions: float32 [B, num_classes]."""


@torch.inference_mode()
def draw_label_maps(annotator: Annotator, images: Tensor, *, top: int = 5, flip: bool = False) -> Drawing:
    """Label maps of normalised images [B, 3, H, W], on their device.

    Args:
        top: guesses kept for each position, at most `annotator.num_classes`.
        flip: average the logits with those of the mirrored image, mirrored back.

    Who reads a label map takes the classes that are left out for zeros. So the logits of a position are shifted until
    that is what they are together: its softmax over (the best, zeros) gives the best the probabilities that the annotator
    gave them. Without it the best of an annotator with negative logits, as binary cross-entropy trains them, would be
    less likely than all that it rejected. Where `top` leaves nothing out, nothing is shifted.
    """
    features, layout = annotator.features(images)
    mirrored = annotator.features(images.flip(-1))[0].flip(2) if flip else None
    B, h, w, _ = features.shape
    group = max(1, MAX_LOGITS // (h * w * annotator.num_classes))
    scores, classes, means = [], [], []
    for start in range(0, B, group):
        logits = annotator.classify(features[start : start + group], layout).float()  # [b, h, w, K]
        if mirrored is not None:
            logits = (logits + annotator.classify(mirrored[start : start + group], layout).float()) / 2
        best = logits.topk(top, dim=-1)
        scores.append((best.values - _level_of_the_rest(logits, best.indices)).permute(0, 3, 1, 2))
        classes.append(best.indices.permute(0, 3, 1, 2))
        means.append(logits.mean(dim=(1, 2)))
    return Drawing(torch.cat(scores), torch.cat(classes), torch.cat(means))


def _level_of_the_rest(logits: Tensor, best: Tensor) -> Tensor:
    """The logit that each class of [..., K] outside of `best` [..., top] would have if all of them had the same: [..., 1]."""
    left_out = logits.shape[-1] - best.shape[-1]
    if not left_out:
        return logits.new_zeros(())
    rest = logits.scatter(-1, best, -math.inf)
    return rest.logsumexp(dim=-1, keepdim=True) - math.log(left_out)


def load_annotator(how: AnnotatorConfig, device: torch.device | str = "cpu") -> LoadedModel[Any]:
    """The annotator that `how` names, as `volo.inference.model_source.load` does, models of timm included.

    Its preprocessing is with `how.img_size` and, for a centre crop, `how.crop`. Of a run folder whose best weights label no
    tokens, the last ones. Raises ValueError, FileNotFoundError for unknown names and missing files, for exported files, and
    for a VOLO that has never learned to label a token; DownloadError.
    """
    check_view(how.crop, how.img_size)
    if is_exported(Path(how.model)):
        raise ValueError(
            f"{how.model} is an exported file, which names whole images; an annotator has to name their tokens: give the run folder or "
            "the checkpoint that it was made from"
        )

    def read(model: str) -> LoadedModel[Any]:
        return load(
            model,
            task="classify",
            img_size=how.img_size or None,
            crop=None if how.crop == "squash" else how.crop,
            device=device,
            timm=True,
            weights=how.weights or None,
        )

    loaded, last = read(how.model), Path(how.model) / "last.pt"
    if _knows_no_tokens(loaded.model) and last.is_file():
        loaded = read(str(last))
    if _knows_no_tokens(loaded.model):
        raise ValueError(
            f"{how.model} cannot be an annotator: its aux head is zero, as a linear probe leaves it, so that every class would be equally "
            "likely at every token. Train it with loss.token_weight (recipe photos_annotator does), or name another one"
        )
    return loaded


def _knows_no_tokens(model: nn.Module) -> bool:
    """Whether a VOLO says the same of every token. The best weights of a run that began with a linear probe may be the probe."""
    if not isinstance(model, VOLO) or not isinstance(model.aux_head, nn.Linear) or model.aux_head.weight.is_meta:
        return False
    return not bool(model.aux_head.weight.any())


def check_view(crop: float | Literal["squash"], img_size: Size) -> None:
    """Raises ValueError for what no annotator can see."""
    if crop != "squash" and not 0 < crop <= 4:
        raise ValueError(f"crop is squash, or a share above 0 and at most 4 such as 0.96; given: {crop}")
    if min(height_width(img_size)) < 0:
        raise ValueError(f"the annotator's img_size is a number of pixels, or height and width; given: {img_size}")


def describe(loaded: LoadedModel[Any], how: AnnotatorConfig) -> dict[str, Any]:
    """What a store says of its annotator: model, weights, img_size, crop, ..."""
    data, path = loaded.preprocessing, Path(how.model)
    name = path.resolve().name if path.exists() else how.model
    return {
        "model": name,
        "weights": name if path.exists() else Path(how.weights).name or "published",
        "weights_digest": weights_digest(loaded.model),
        "img_size": list(height_width(data.img_size)),
        "crop": how.crop if how.crop == "squash" else float(how.crop),
        "interpolation": "bilinear" if data.interpolation == "bilinear" else "bicubic",
        "mean": list(data.mean),
        "std": list(data.std),
    }


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that any change of a parameter or buffer changes."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
