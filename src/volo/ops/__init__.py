"""The operator: one mathematics (`outlook_attention`), several engines."""

from volo.ops import library as _library  # noqa: F401  puts the fused engines in front of the reference
