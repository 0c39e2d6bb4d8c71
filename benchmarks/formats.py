"""Models through the formats of `volo export` and back: error, equal answers on pictures, size of the file, speed.

    python benchmarks/formats.py --formats onnx aoti --models nano d1 --pictures imagenet_samples/images

ExecuTorch, Core ML and LiteRT need an environment each; rows of other formats and models stay in --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor
from transfer import keep

import volo
from volo.bench.timing import alternate, setting
from volo.config import DataConfig
from volo.data.transforms import height_width
from volo.deploy import check
from volo.deploy.export import KINDS
from volo.deploy.formats import coreml
from volo.inference.exported import open_exported
from volo.inference.model_source import LoadedModel
from volo.inference.predictor import find_pictures
from volo.models.factory import create_model, create_segmenter
from volo.models.volo import VOLO

REPEATS = 4
"""Calls of a measurement, so that the clock's ticks do not matter."""
NUMBERS = tuple(map(str, range(1000)))
RESULTS = Path(__file__).parent / "results" / "formats.json"
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


def row_of(name: str, model: str, pictures: list[Path], folder: Path, rounds: int) -> dict[str, object]:
    loaded = model_of(model)
    path = folder / f"{model}{KINDS[name].ending}"
    report = volo.export(loaded, path, format=name).values
    exported = opened(path, name)
    error, same = 0.0, 0.0
    for first in range(0, len(pictures), 16):
        images = check.read_images(pictures[first : first + 16], loaded.preprocessing)
        with torch.inference_mode():
            expected, given = loaded.model(images).float(), exported(images)
        error = max(error, float((given - expected).abs().max() / expected.abs().max()))
        same += float((given.argmax(1) == expected.argmax(1)).float().mean()) * len(images)
    row = {
        "format": name,
        "model": model,
        "what": MODELS[model],
        "relative_error": error,
        "pictures": len(pictures),
        "same_answers": round(same, 4),
        "bytes": report["bytes"],
        "versions": report["versions"],
    }
    if name != "coreml":  # which does not run here
        row["images_per_second"] = speeds(loaded, name, path, folder, rounds)
        row["machine"] = setting(torch.device("cpu"))
    return row


def opened(path: Path, name: str) -> Callable[[Tensor], Tensor]:
    return coreml.replay(path) if name == "coreml" else open_exported(path, trust=True)


def speeds(loaded: LoadedModel, name: str, path: Path, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Images per second of one core, by its processor time, of the file and of the model itself (fused), in turns.

    One thread and its processor time, so that a machine which others use as well tells nearly the same.
    """
    found = {}
    fused = copy.deepcopy(loaded.model)
    if isinstance(fused, VOLO):
        fused.fuse_for_inference()
    else:
        volo.fuse(fused)
    for batch in (1, 8):
        if KINDS[name].is_fixed and batch != 1:
            path = folder / f"of_{batch}{KINDS[name].ending}"
            volo.export(loaded, path, format=name, batch_size=batch)
        images = torch.randn(batch, 3, *height_width(loaded.preprocessing.img_size))
        calls = {"file": partial(call, opened(path, name), images), "model": partial(call, fused, images)}
        times = alternate(calls, rounds=rounds, clock=time.process_time)
        found[str(batch)] = {what: REPEATS * batch / timing.median for what, timing in times.items()}
    return found


@torch.inference_mode()
def call(run: Callable[[Tensor], Tensor], images: Tensor) -> None:
    for _ in range(REPEATS):
        run(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", required=True, choices=list(KINDS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--pictures", required=True)
    parser.add_argument("--rounds", type=int, default=5, help="of measuring speed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = find_pictures([options.pictures])
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.exists() else []
    for name in options.formats:
        for model in options.models:
            with tempfile.TemporaryDirectory() as folder:
                row = row_of(name, model, pictures, Path(folder), options.rounds)
            print(json.dumps(row), flush=True)
            rows = [other for other in rows if (other["format"], other["model"]) != (name, model)] + [row]
            keep(options.out, {"what": "formats", "rows": rows})


if __name__ == "__main__":
    main()
