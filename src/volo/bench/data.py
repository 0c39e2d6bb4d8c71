"""The input pipeline, part by part, on one core: what an image costs before a GPU sees it, and where the limit is."""

from __future__ import annotations

import io
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from volo.bench.timing import Timing, alternate, setting
from volo.config import AugmentConfig, DataConfig
from volo.data import keyed
from volo.data.decode import decode_image
from volo.data.images import FolderSource, TarSource, open_data
from volo.data.label_maps import Block, LabelMaps, ShardWriter, write_index
from volo.data.loader import TrainLoader
from volo.data.pack import pack
from volo.data.rand_augment import parse_rand_augment
from volo.data.transforms import RandomResizedCrop, height_width

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
MAP_SIDE, MAP_TOP, MAP_CLASSES = 18, 5, 1000
"""Of the label maps that came with the paper."""


def bench_data(
    *,
    img_size: int = 224,
    pictures: int = 32,
    width: int = 500,
    height: int = 375,
    shrunk_side: int = 256,
    images_per_second: float = 1000.0,
    rounds: int = 7,
) -> dict[str, Any]:
    """Time of one core for reading, decoding, augmenting and stacking images of ImageNet's size, from folder and shards.

    The images are made here (structure at all scales, noise, JPEG quality 92, about ImageNet's bytes a pixel), and come
    from the page cache: a disk or a network is not measured. Time is that of the processor, so that waiting for a busy
    machine does not count, although its caches and clock do.

    Args:
        images: so many different ones in a turn.
        shrunk_side: shorter side of the packed images whose decoding is compared.
        images_per_second: what a GPU takes; the result says how many cores that needs.

    Returns a dict with a row for every part: milliseconds for an image (median, quartiles), images per second and core,
    share of the whole from shards; `cores_needed`, of the whole with label maps, for `images_per_second`.
    """
    size = height_width(img_size)
    with tempfile.TemporaryDirectory() as folder, keyed.own_random_state():
        root = Path(folder)
        encoded = write_pictures(root / "folder", pictures, width, height)
        data = DataConfig(path=str(root / "folder"), img_size=img_size, cache="none", val_fraction=0.01)
        augment = AugmentConfig(rand_augment=RAND_AUGMENT)
        pack(data, root / "shards")
        pack(data, root / "small", shorter_side=shrunk_side, quality=90)
        from_folder, from_shards, small = (
            open_data(DataConfig(path=str(root / name), img_size=img_size, cache="none", val_fraction=0.01)).train
            for name in ("folder", "shards", "small")
        )
        assert isinstance(from_folder, FolderSource) and isinstance(from_shards, TarSource)
        assert isinstance(small, TarSource)
        count = len(from_shards)
        small_encoded = [small.read(i) for i in range(count)]
        maps = write_label_maps(root / "maps", from_shards.names)
        whole = {
            name: TrainLoader(source, data, augment, batch_size=count, num_workers=0, **options).samples  # type: ignore[arg-type]
            for name, source, options in (
                ("all of it, from a folder", from_folder, {}),
                ("all of it, from shards", from_shards, {}),
                ("all of it, from shards, with label maps", from_shards, {"label_maps": maps}),
                ("all of it, from small shards, with label maps", small, {"label_maps": maps}),
            )
        }
        decoded = [decode_image(content) for content in encoded[:count]]
        crop = RandomResizedCrop(size, augment.scale, augment.ratio, data.interpolation)
        cropped = [crop(picture) for picture in decoded]
        batch = torch.empty(count, 3, *size, dtype=torch.uint8)

        def stack() -> None:
            for i, picture in enumerate(cropped):
                batch[i] = picture

        epochs = itertools.count()
        numbers = np.arange(count)
        candidates: dict[str, Callable[[], object]] = {
            "read a file of a folder": lambda: [from_folder.read(i) for i in range(count)],
            "read from a shard": lambda: [from_shards.read(i) for i in range(count)],
            "decode": _for_each(decode_image, encoded[:count]),
            "decode with torchvision": _for_each(_decode_with_torchvision, encoded[:count]),
            "decode at half the size (DCT scaling)": _for_each(_decode_half, encoded[:count]),
            f"decode, packed at a shorter side of {shrunk_side}": _for_each(decode_image, small_encoded),
            "random resized crop": _for_each(crop, decoded),
            "flip": _for_each(v2.RandomHorizontalFlip(), cropped),
            "RandAugment": _for_each(parse_rand_augment(RAND_AUGMENT), cropped),
            "stack": stack,
            "read a label map": lambda: maps.read_batch(from_shards.names),
            **{name: _batch(loader, epochs, numbers) for name, loader in whole.items()},
        }
        timings = alternate(candidates, rounds=rounds, clock=time.process_time)
    unit = timings["all of it, from shards"].median
    rows = [_row(name, timing, count, unit) for name, timing in timings.items()]
    rate = count / timings["all of it, from shards, with label maps"].median
    return {
        "what": "input pipeline, one core",
        "img_size": img_size,
        "pictures": count,
        "picture_size": [width, height],
        "picture_kilobytes": sum(map(len, encoded)) / len(encoded) / 1e3,
        "small_kilobytes": sum(map(len, small_encoded)) / count / 1e3,
        "rand_augment": RAND_AUGMENT,
        "rounds": rounds,
        "images_per_second": images_per_second,
        "cores_needed": math.ceil(images_per_second / rate),
        **setting(torch.device("cpu")),
        "pillow": Image.__version__,
        "rows": rows,
    }


def _row(name: str, timing: Timing, count: int, unit: float) -> dict[str, Any]:
    return {
        "candidate": name,
        "milliseconds": timing.median / count * 1e3,
        "quartiles": [q / count * 1e3 for q in timing.quartiles],
        "per_second_and_core": count / timing.median,
        "of_all": timing.median / unit,
    }


def _for_each(function: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], object]:
    def run() -> None:
        keyed.seed_random_state(0)  # the same crops and operations in every turn
        for one in inputs:
            function(one)

    return run


def _batch(pictures: Callable[..., object], epochs: itertools.count[int], numbers: np.ndarray) -> Callable[[], object]:
    return lambda: pictures(next(epochs), numbers)


def _decode_with_torchvision(content: bytes) -> Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _decode_half(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (image.width // 2, image.height // 2))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_pictures(root: Path, count: int, width: int, height: int) -> list[bytes]:
    """JPEG files in two class folders that cost a decoder what photographs do; returns them, in the order of a source."""
    encoded: dict[str, bytes] = {}
    for number in range(count):
        path = root / ("a", "b")[number % 2] / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(photo(number, width, height)).save(file, "JPEG", quality=92)
        path.write_bytes(file.getvalue())
        encoded[str(path)] = file.getvalue()
    return [encoded[path] for path in sorted(encoded)]


def photo(seed: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: patches of all sizes, larger ones stronger, as in nature, and a sensor's noise."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (4, 8, 16, 32, 64, 128, 256):
        coarse = generator.normal(0, 1, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        channels = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(channel) for channel in channels], axis=-1) * scale**0.8
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 120 + generator.normal(0, 15, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def write_label_maps(folder: Path, names: Sequence[str]) -> LabelMaps:
    """A store of maps as large as the paper's: a few neighbouring guesses at each position."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    writer, block = ShardWriter(folder, 0), Block()
    for name in names:
        guesses = generator.permutation(MAP_CLASSES)[:40]
        classes = guesses[generator.integers(0, 40, (1, MAP_SIDE, MAP_SIDE)) + np.arange(MAP_TOP)[:, None, None] - 40]
        scores = -np.sort(-generator.normal(0, 4, classes.shape), axis=0)
        block.add(name, scores.astype(np.float16), classes, "exact", 0)
    writer.append(block)
    writer.finish()
    header = {
        "top": MAP_TOP,
        "grid": [MAP_SIDE, MAP_SIDE],
        "num_classes": MAP_CLASSES,
        "classes": [],
        "encoding": "exact",
        "annotator": {"crop": "squash", "img_size": [224, 224]},
    }
    write_index(folder, header, 1)
    return LabelMaps.open(folder)
