"""Labelled images: `open_data` finds out what lies at `data.path` and opens its training and held-out part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from volo.config import DataConfig
from volo.data.arrays import find_npz, open_digits, open_npz, open_torchvision_cifar
from volo.data.decode import BadImage, BadImageError, decode_image
from volo.data.folders import open_folder, open_folders
from volo.data.shards import TarSource, is_shards, open_shards
from volo.data.sources import LAYOUTS, ArraySource, DataSplits, FolderSource, ImageSource, Progress, Share
from volo.data.tables import is_table, open_table
from volo.data.walk import contents_of, is_image_name, list_folder

__all__ = [
    "ArraySource",
    "BadImage",
    "BadImageError",
    "DataSplits",
    "FolderSource",
    "ImageSource",
    "TarSource",
    "data_kind",
    "decode_image",
    "is_image_name",
    "open_data",
    "open_folder",
]


def open_data(config: DataConfig, *, on_progress: Progress | None = None, share: Share = Share()) -> DataSplits:
    """Open training and held-out images; every image is tried before this returns, unless `config.check` is "off".

    `on_progress(done, total)` is called while images are decoded. With a `share` several processes, which all call this,
    try them together. The notes begin with what the names of folders, files and classes were taken for. Raises ValueError for anything that a run would
    stumble over later: a layout that is not understood, classes that do not match, images that cannot be decoded
    (all of them are named, unless `on_bad_image` is "skip"), a failed download.
    """
    splits = _open(config, on_progress, share)
    notes = splits.understood(config) + splits.notes + splits.check_classes()
    return replace(splits, notes=notes)


def _open(config: DataConfig, on_progress: Progress | None, share: Share) -> DataSplits:
    path = Path(config.path).expanduser()
    kind = data_kind(config)
    if kind == "digits":
        return open_digits(config)
    if kind in ("cifar10", "cifar100") and not (config.path and any(path.glob("data_batch_*.npz"))):
        return open_torchvision_cifar(kind, path if config.path else None)
    if kind == "folder":
        return open_folders(path, config, on_progress, share)
    if kind == "tar":
        return open_shards(config, on_progress, share)
    if kind == "table":
        return open_table(config, on_progress, share)
    return open_npz(path, config, on_progress)


def data_kind(config: DataConfig) -> str:
    """`config.kind`, or what lies at `config.path` where that is "auto". Raises ValueError for what is not understood."""
    if config.kind == "digits" and config.path:
        raise ValueError(
            f"data.path is {config.path}, but data.kind is 'digits', which are scikit-learn's own; leave data.path empty, or "
            "read it with --data.kind auto"
        )
    if config.kind != "auto":
        return config.kind
    path = Path(config.path).expanduser()
    if not config.path:
        raise ValueError(f"name the images with --data PATH; --data.kind digits for the handwritten digits.\n{LAYOUTS}")
    if path.is_file() and path.suffix.lower() == ".npz":
        return "npz"
    if is_table(path):
        return "table"
    if not path.is_dir() and is_shards(config.path):
        return "tar"
    if not path.exists():
        raise ValueError(f"data.path is {config.path}, which does not exist.\n{LAYOUTS}")
    if not path.is_dir():
        raise ValueError(
            f"data.path is {config.path}, a file that is neither .npz nor .tar nor a table (.csv, .tsv, .parquet).\n{LAYOUTS}"
        )
    if find_npz(path, config.splits).train:
        return "npz"
    for kind, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        if (path / folder).is_dir():
            return kind
    if is_shards(path, config.splits):
        return "tar"
    if list_folder(path)[0]:
        return "folder"
    raise ValueError(f"data.path is {config.path}, which holds {contents_of(path)}.\n{LAYOUTS}")
