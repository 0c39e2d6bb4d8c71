"""The 1000 classes of ImageNet-1k by their WordNet ids and names (the file beside this one; see NOTICE)."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet ids and English names of ImageNet-1k's 1000 classes, in the order of published weights."""
    lines = Path(__file__).with_name("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines)
    wnids = tuple(lemmas)
    names = [lemmas[wnid].split(",")[0] for wnid in wnids]
    # Short names that occur twice (crane, maillot) are written out; the bird and the machine differ by id alone.
    names = [lemmas[w] if names.count(n) > 1 else n for w, n in zip(wnids, names)]
    return wnids, tuple(f"{n} ({w})" if names.count(n) > 1 else n for w, n in zip(wnids, names))
