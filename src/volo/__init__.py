"""VOLO, Vision Outlooker: image recognition with outlook attention (arXiv 2106.13112)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volo.models.fuse import fuse
    from volo.models.segmenter import Segmenter, SegmenterConfig, create_segmenter, list_segmenters
    from volo.models.volo import VOLO, VOLOConfig, create_model, list_models
    from volo.ops.outlook_attention import outlook_attention

__version__ = "0.1.0"

__all__ = [
    "Segmenter",
    "SegmenterConfig",
    "VOLO",
    "VOLOConfig",
    "create_model",
    "create_segmenter",
    "fuse",
    "list_models",
    "list_segmenters",
    "outlook_attention",
]

_HOMES = (
    dict.fromkeys(["VOLO", "VOLOConfig", "create_model", "list_models"], "volo.models.volo")
    | dict.fromkeys(["Segmenter", "SegmenterConfig", "create_segmenter", "list_segmenters"], "volo.models.segmenter")
    | {"fuse": "volo.models.fuse", "outlook_attention": "volo.ops.outlook_attention"}
)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: it is left until one of these names is used, so that `volo --help` answers at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
