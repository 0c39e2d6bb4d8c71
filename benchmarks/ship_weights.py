"""A run of `volo train` as one small file of weights: averaged weights in float16, and in the metadata all that it takes to use them.

python benchmarks/ship_weights.py runs/pictures64_nano --out src/volo/weights/volo_nano.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save

import volo
from volo.data.files import write_atomically
from volo.data.imagenet import imagenet_classes
from volo.inference.sharing import described
from volo.models.loading import DESCRIPTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = volo.load(options.run)
    wnids, names = imagenet_classes()
    if set(loaded.classes) <= set(
        wnids
    ):  # classes that are called by their WordNet ids get their English names beside them
        english = tuple(names[wnids.index(wnid)] for wnid in loaded.classes)
        loaded = dataclasses.replace(loaded, classes=english, wnids=loaded.classes)
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in loaded.model.state_dict().items()
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ValueError(f"{options.run} has weights beyond float16")
    content = save(weights, {DESCRIPTION: json.dumps(described(loaded), ensure_ascii=False)})
    write_atomically(options.out, lambda file: file.write(content))
    print(f"{options.out}: {len(content):,} bytes, {loaded.origin}")


if __name__ == "__main__":
    main()
