"""The operator: one mathematics (`outlook_attention`), several backends."""

from volo.ops import library as _library  # noqa: F401  puts the fused backends in front of the reference
