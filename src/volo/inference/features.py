"""What a VOLO knows of images before any class is named: features, computed once and kept on the disk by content."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from volo.config import DataConfig
from volo.data.files import cache_folder, write_atomically
from volo.data.loader import EvalLoader
from volo.data.sources import ImageSource
from volo.data.transforms import PixelPipeline
from volo.inference.evaluate import AMP_DTYPES
from volo.models.volo import VOLO

logger = logging.getLogger(__name__)

Pool = Literal["token", "concat"]
MOST_KEPT_BYTES = 2**31
"""Features of larger sets are computed anew each time."""


def extract_features(
    model: VOLO,
    source: ImageSource,
    data: DataConfig,
    *,
    pool: Pool = "concat",
    views: int = 1,
    device: torch.device | str = "cpu",
    amp: str = "off",
    batch_size: int = 64,
    keep: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Features of all images of `source`, float32 [views, N, F] on the CPU, as evaluation shows them.

    Args:
        data: size, crop and normalisation.
        pool: the class token, or class token, mean and maximum of the other tokens one after another (`VOLO.pool`).
        views: 2 adds the mirrored images.
        keep: take them from the cache folder if they were computed before by the same weights from the same images, and leave
            them there; a cache that cannot be read or written is passed over.
        on_progress: is called with (images done, images in all).

    Raises BadImageError, or ValueError where images that cannot be read are skipped.
    """
    path = _place(model, source, data, pool, views, amp) if keep else None
    if path is not None and (kept := _read(path, len(source))) is not None:
        if on_progress is not None:
            on_progress(len(source), len(source))
        return kept
    device = torch.device(device)
    pixels = PixelPipeline(data).to(device).eval()
    backbone = for_features(model, device)
    loader = EvalLoader(source, data, batch_size=batch_size)
    rows: list[Tensor] = []
    done = 0
    with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
        for batch in loader:
            images = pixels(batch["image"].to(device))
            shown = [images, images.flip(-1)][:views]
            rows.append(
                torch.stack([backbone.pool(backbone.forward_features(view), pool).float() for view in shown]).cpu()
            )
            done += len(images)
            if on_progress is not None:
                on_progress(done, len(source))
    if done != len(source):
        raise ValueError(
            f"{len(source) - done} of {len(source)} images cannot be read, and features are needed of all: let them be found and left "
            "out first (--data.check full)"
        )
    features = torch.cat(rows, dim=1).clone()
    if path is not None and features.nbytes <= MOST_KEPT_BYTES:
        _write(path, features)
    return features


def for_features(model: VOLO, device: torch.device) -> VOLO:
    """A copy of the model as fast as its features can be had on the device; the model itself stays as it is."""
    backbone = copy.deepcopy(model).to(device).eval()
    return backbone.fuse_for_inference() if device.type == "cpu" else backbone


def weights_digest(model: nn.Module) -> str:
    """Of the weights that features depend on: all but the heads."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(("head.", "aux_head.")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def _place(model: VOLO, source: ImageSource, data: DataConfig, pool: Pool, views: int, amp: str) -> Path | None:
    """The file of these features: its name depends on the weights, on the content of the images and on how they are shown."""
    how = [data.img_size, data.crop_pct, data.interpolation == "bilinear", data.mean, data.std, pool, views, amp]
    heads_and_training = ("num_classes", "pool", "drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate")
    config = {key: value for key, value in asdict(model.config).items() if key not in heads_and_training}
    digest = hashlib.sha256(json.dumps([1, weights_digest(model), how, config, len(source)]).encode())
    try:
        for index in range(len(source)):
            digest.update(source.fingerprint(index).to_bytes(8, "little", signed=True))
        return cache_folder() / "features" / f"{digest.hexdigest()[:40]}.safetensors"
    except (OSError, ValueError) as error:  # no home folder, or an image that cannot be read, which the loader will say
        logger.debug("features are not kept: %s", error)
        return None


def _read(path: Path, count: int) -> Tensor | None:
    """None for what is not there, belongs to somebody else, or is damaged: features can be computed again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kept, checksum = file.get_tensor("features"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, ValueError):
        return None
    return kept if kept.dim() == 3 and kept.shape[1] == count and checksum == _checksum(kept) else None


def _write(path: Path, features: Tensor) -> None:
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({"features": features.contiguous()}, {"sha256": _checksum(features)})
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        logger.info("features are not kept for the next time: %s", error)


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().data).hexdigest()
