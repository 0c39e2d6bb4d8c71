"""VOLO, Vision Outlooker: image recognition with outlook attention (arXiv 2106.13112)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volo.config import load_recipe
    from volo.deploy.export import export
    from volo.inference.embed import Embeddings, embed
    from volo.inference.model_source import LoadedModel, load
    from volo.inference.predictor import predict
    from volo.inference.score import evaluate
    from volo.inference.sharing import from_pretrained, push_to_hub, save_pretrained
    from volo.models.factory import create_model, create_segmenter, list_models, list_segmenters
    from volo.models.fuse import fuse
    from volo.models.hub import list_pretrained
    from volo.models.segmenter import Segmenter, SegmenterConfig
    from volo.models.volo import VOLO, VOLOConfig
    from volo.ops.outlook_attention import outlook_attention
    from volo.training.pipeline import train

__version__ = "0.1.0"

__all__ = [
    "Embeddings",
    "LoadedModel",
    "Segmenter",
    "SegmenterConfig",
    "VOLO",
    "VOLOConfig",
    "create_model",
    "create_segmenter",
    "embed",
    "evaluate",
    "export",
    "from_pretrained",
    "fuse",
    "list_models",
    "list_pretrained",
    "list_segmenters",
    "load",
    "load_recipe",
    "outlook_attention",
    "predict",
    "push_to_hub",
    "save_pretrained",
    "train",
]

_HOMES = {
    "Embeddings": "volo.inference.embed",
    "LoadedModel": "volo.inference.model_source",
    "Segmenter": "volo.models.segmenter",
    "SegmenterConfig": "volo.models.segmenter",
    "VOLO": "volo.models.volo",
    "VOLOConfig": "volo.models.volo",
    "create_model": "volo.models.factory",
    "create_segmenter": "volo.models.factory",
    "embed": "volo.inference.embed",
    "evaluate": "volo.inference.score",
    "export": "volo.deploy.export",
    "from_pretrained": "volo.inference.sharing",
    "fuse": "volo.models.fuse",
    "list_models": "volo.models.factory",
    "list_pretrained": "volo.models.hub",
    "list_segmenters": "volo.models.factory",
    "load": "volo.inference.model_source",
    "load_recipe": "volo.config",
    "outlook_attention": "volo.ops.outlook_attention",
    "predict": "volo.inference.predictor",
    "push_to_hub": "volo.inference.sharing",
    "save_pretrained": "volo.inference.sharing",
    "train": "volo.training.pipeline",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: it is left until one of these names is used, so that `volo --help` answers at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
