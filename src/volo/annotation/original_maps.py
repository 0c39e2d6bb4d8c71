"""Label maps as the original tool of token labeling stores them: a file CLASS/NAME.pt for each picture."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

FIRST_INEXACT = 2049
"""float16 has 11 bits: from here on it cannot tell neighbouring whole numbers apart."""


class OriginalMapError(ValueError):
    """A file that is missing or holds no label map; the message says which and why."""


def find_original_map(folder: Path, name: str) -> Path | None:
    """The file for a picture called `name`, or None.

    The original drops all but the last folder of a path, and everything from the first dot on; a file that keeps more of
    the name is preferred, since it cannot belong to another picture.
    """
    picture = PurePosixPath(name)
    last = PurePosixPath(*picture.parts[-2:])
    for candidate in (picture, last):
        for stem in (candidate.with_suffix(""), candidate.with_name(candidate.name.split(".")[0] or candidate.name)):
            path = folder / f"{stem}.pt"
            if path.is_file():
                return path
    return None


def read_original_map(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [top, h, w] (float16 or float32), falling, and classes int64 [top, h, w]; no code in the file is run.

    Raises OriginalMapError for a file that is no tensor [2, top, h, w] of scores and class indices, for classes beyond
    `num_classes`, and for classes that float16 has blurred.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise OriginalMapError(
            f"{path} is damaged, or holds more than tensors; it is not opened, because such a file can run code"
        ) from error
    except Exception as error:  # damage may look like anything to the unpickler
        raise OriginalMapError(f"{path} is damaged or cut off ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, Tensor) or content.dim() != 4 or content.shape[0] != 2 or not content.numel():
        found = f"a tensor {list(content.shape)}" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise OriginalMapError(f"{path} holds {found}; a label map of the original is a tensor [2, top, h, w]")
    scores, indices = content[0].detach(), content[1].double()
    if not (torch.isfinite(scores).all() and (indices == indices.round()).all() and indices.min() >= 0):
        raise OriginalMapError(f"{path} holds numbers that are no logits and class indices")
    largest = int(indices.max())
    # 2049 rounds to 2048, which is therefore one class only where there is no class 2049.
    is_blurred = largest >= FIRST_INEXACT or (largest == FIRST_INEXACT - 1 and num_classes > FIRST_INEXACT)
    if content.dtype == torch.float16 and is_blurred:
        raise OriginalMapError(
            f"{path} has the class index {largest}, stored as float16, which is exact only to 2048: above, 2049 became 2048, "
            "from 4096 on only multiples of 4 are left, and so on. Which class was meant is lost, here and in every file of "
            "that annotator. Draw the maps anew: volo annotate stores whole numbers"
        )
    if largest >= num_classes:
        raise OriginalMapError(f"{path} has the class index {largest}, but the data has {num_classes} classes")
    ranked = scores.float().sort(dim=0, descending=True, stable=True)
    kept = ranked.values.to(torch.float16) if content.dtype == torch.float16 else ranked.values
    return kept.numpy(), indices.long().gather(0, ranked.indices).numpy()
