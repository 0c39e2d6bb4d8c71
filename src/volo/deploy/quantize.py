"""int8 for OpenVINO, by NNCF: calibrated on real images, and the layers found that must stay in floating point."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import openvino


def quantize_openvino(
    model: openvino.Model, images: Tensor, least_agreement: float
) -> tuple[openvino.Model, list[str], float]:
    """`model` with int8 weights and activations, calibrated on images [N, 3, H, W].

    Everything is quantised first. Where fewer than `least_agreement` of the answers stay, one convolution after the other
    is left in floating point, and at last all of them: they are few, and a single one of the stem can cost a quarter of the
    answers.

    Returns:
        The first that is good enough, else the best; the names of the layers left in floating point; the share of
        answers that stayed.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    pictures = [image[None].numpy() for image in images]
    expected = _answers(model, pictures)
    best: tuple[openvino.Model, list[str], float] | None = None
    for kept in _candidates(model):
        with contextlib.redirect_stdout(io.StringIO()):  # its bars
            quantized = nncf.quantize(
                model.clone(),
                nncf.Dataset(pictures),
                subset_size=len(pictures),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=kept) if kept else None,
            )
        agreement = float(np.mean(_answers(quantized, pictures) == expected))
        if best is None or agreement > best[2]:
            best = quantized, kept, agreement
        if agreement >= least_agreement:
            break
    assert best is not None
    return best


def _candidates(model: openvino.Model) -> Iterator[list[str]]:
    """Names of the layers to keep, the fewest first."""
    convolutions = [
        node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"
    ]
    yield []
    yield from ([name] for name in convolutions)
    yield convolutions


def _answers(model: openvino.Model, pictures: list[np.ndarray]) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(picture)[0].argmax(1) for picture in pictures])
