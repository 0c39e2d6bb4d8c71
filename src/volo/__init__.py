"""VOLO, Vision Outlooker: image recognition with outlook attention (arXiv 2106.13112)."""

from volo.models.volo import VOLO, VOLOConfig, create_model, list_models
from volo.ops.outlook_attention import outlook_attention

__version__ = "0.1.0"

__all__ = ["VOLO", "VOLOConfig", "create_model", "list_models", "outlook_attention"]
