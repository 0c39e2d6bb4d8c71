"""How sure near-duplicates are found: copies of the photos in a folder, changed in known ways, against pairs of different photos.

    python benchmarks/data_check.py PHOTOS --count 400 --out benchmarks/results/data_check.json

Each copy is compared with its photo by the two measures that `volo embed --check` asks for: the cosine similarity of standardised
vectors, and the correlation of grey thumbnails. "pairs" counts pairs of different photos above the thresholds.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from volo.bench.timing import setting
from volo.data.decode import decode_image
from volo.data.files import write_atomically
from volo.data.sources import ArraySource
from volo.data.walk import images_below
from volo.explain.data_check import PIXELS_ALIKE, THRESHOLD, grey_thumbnails, near_duplicates
from volo.inference.embed import standardised, volo_classifier
from volo.inference.features import extract_features

SIDE = 160


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def brighter(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(image) * 1.1, 0, 255).round().astype(np.uint8))


COPIES = {
    "the photo itself": lambda image: image,
    "encoded again as JPEG of quality 75": lambda image: jpeg(image, 75),
    "encoded again as JPEG of quality 40": lambda image: jpeg(image, 40),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "10 % brighter": brighter,
    "reduced to two thirds": lambda image: image.resize((2 * image.width // 3, 2 * image.height // 3)),
    "cropped by 2.5 % at each side": lambda image: image.crop(
        (image.width // 40, image.height // 40, image.width - image.width // 40, image.height - image.height // 40)
    ),
}


def source_of(images: list[Image.Image]) -> ArraySource:
    """All squashed to one square, as an array."""
    pixels = [torch.from_numpy(np.asarray(image.resize((SIDE, SIDE))).copy()).permute(2, 0, 1) for image in images]
    return ArraySource(
        torch.stack(pixels), torch.zeros(len(images), dtype=torch.int64), list(map(str, range(len(images)))), ("a",)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", default="volo_nano")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    loaded = volo_classifier(options.model)
    files = images_below(options.photos)
    files = files[:: max(1, len(files) // options.count)][: options.count]
    photos = [Image.fromarray(decode_image(file).permute(1, 2, 0).numpy()) for file in files]
    sources = [source_of([change(photo) for photo in photos]) for change in COPIES.values()]
    features = [extract_features(loaded.model, source, loaded.preprocessing, views=2, keep=False) for source in sources]
    thumbnails = [grey_thumbnails({"train": source}) for source in sources]
    count, width = len(photos), features[0].shape[-1]
    unit = standardised(torch.cat(features, dim=1).reshape(-1, width)).view(2, len(COPIES), count, width)
    flat = [small.flatten(1) - small.flatten(1).mean(dim=1, keepdim=True) for small in thumbnails]
    mirrored = [small.flip(-1).flatten(1) - small.flatten(1).mean(dim=1, keepdim=True) for small in thumbnails]
    rows = {}
    for k, name in enumerate(COPIES):
        similarity = torch.maximum((unit[0, 0] * unit[0, k]).sum(dim=1), (unit[1, 0] * unit[0, k]).sum(dim=1))
        one, other = (torch.cosine_similarity(version[0], flat[k], dim=1) for version in (flat, mirrored))
        correlation = torch.maximum(one, other)
        is_found = (similarity >= THRESHOLD) & (correlation >= PIXELS_ALIKE)
        rows[name] = {
            "lowest_similarity": round(float(similarity.min()), 3),
            "lowest_correlation": round(float(correlation.min()), 3),
            "found": round(float(is_found.float().mean()), 3),
        }
        print(f"{name:38} {rows[name]}")
    _, pairs = near_duplicates(features[0], thumbnails[0])
    report = {
        "what": "copies of photos by the measures of volo embed --check",
        "command": " ".join(["python benchmarks/data_check.py", Path(options.photos).name, *sys.argv[2:]]),
        "model": loaded.origin.rpartition("/")[2],
        "photos": count,
        "thresholds": {"similarity": THRESHOLD, "correlation": PIXELS_ALIKE},
        "copies": rows,
        "pairs_of_different_photos": {"listed": pairs, "of": count * (count - 1) // 2},
        "setting": setting(torch.device("cpu")),
    }
    print(json.dumps(report["pairs_of_different_photos"]))
    if options.out is not None:
        content = (json.dumps(report, indent=1) + "\n").encode()
        write_atomically(options.out, lambda file: file.write(content))


if __name__ == "__main__":
    main()
