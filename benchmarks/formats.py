"""Models through the formats of `volo export` and back: error, equal answers on pictures, size of the file.

    python benchmarks/formats.py --formats aoti executorch --models nano d1 --pictures imagenet_samples/images --out formats.json

Executorch, coreml and litert need an environment each; rows are added to those that are in --out already.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import timm
import torch

import volo
from volo.config import DataConfig
from volo.deploy import check
from volo.deploy.export import KINDS
from volo.deploy.formats import coreml
from volo.inference.exported import open_exported
from volo.inference.model_source import LoadedModel
from volo.inference.predictor import find_pictures
from volo.models.factory import create_model, create_segmenter

NUMBERS = tuple(map(str, range(1000)))
MODELS = {
    "nano": "volo_nano, its weights",
    "d1": "volo_d1, random weights",
    "timm": "timm's volo_d1_224 after volo.fuse(model, portable=True), random weights",
    "segmenter": "fpn_volo_nano of two blocks, random weights, 64 x 64",
}


def model_of(name: str) -> LoadedModel:
    torch.manual_seed(0)
    if name == "nano":
        return volo.load("volo_nano")
    if name == "segmenter":
        tiny = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
        model = create_segmenter("fpn_volo_nano", num_classes=3, img_size=32, **tiny).eval()
        return LoadedModel(model, "segment", ("a", "b", "c"), DataConfig(img_size=64), MODELS[name])
    if name == "timm":
        theirs = timm.create_model("volo_d1_224").eval()
        volo.fuse(theirs, portable=True)
        return LoadedModel(theirs, "classify", NUMBERS, DataConfig(img_size=224), MODELS[name])
    return LoadedModel(create_model("volo_d1").eval(), "classify", NUMBERS, DataConfig(img_size=224), MODELS[name])


def row_of(name: str, model: str, pictures: list[Path], folder: Path) -> dict[str, object]:
    loaded = model_of(model)
    path = folder / f"{model}{KINDS[name].ending}"
    report = volo.export(loaded, path, format=name).values
    exported = coreml.replay(path) if name == "coreml" else open_exported(path, trust=True)
    error, same = 0.0, 0.0
    for first in range(0, len(pictures), 16):
        images = check.read_images(pictures[first : first + 16], loaded.preprocessing)
        with torch.inference_mode():
            expected, given = loaded.model(images).float(), exported(images)
        error = max(error, float((given - expected).abs().max() / expected.abs().max()))
        same += float((given.argmax(1) == expected.argmax(1)).float().mean()) * len(images)
    return {
        "format": name,
        "model": MODELS[model],
        "relative_error": error,
        "pictures": len(pictures),
        "same_answers": round(same, 4),
        "bytes": report["bytes"],
        "versions": report["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", required=True, choices=list(KINDS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--pictures", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pictures = find_pictures([options.pictures])
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for name in options.formats:
        for model in options.models:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row_of(name, model, pictures, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
            result = {"what": "formats", "date": time.strftime("%Y-%m-%d"), "rows": rows}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
