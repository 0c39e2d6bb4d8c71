"""Images as vectors: what a VOLO makes of them before any class is named, in files that others can read."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from volo.data.decode import BadImageError, decode_image
from volo.data.files import write_atomically
from volo.data.transforms import PixelPipeline, eval_transform
from volo.inference.evaluate import AMP_DTYPES, not_finite
from volo.inference.exported import is_exported
from volo.inference.features import Pool, extract_features, for_features, weights_digest
from volo.inference.model_source import Crop, LoadedModel, load
from volo.inference.predictor import find_pictures, prepared_batches
from volo.inference.score import OnProgress
from volo.models.volo import VOLO

FORMAT = "volo embed 1"
ENDINGS = (".npz", ".parquet")
MARK = "volo"
"""Name of the array of an npz file, or of the entry of a parquet file's metadata, that says that the file is ours."""


@dataclass(frozen=True)
class Embeddings:
    """Images as vectors."""

    vectors: np.ndarray
    """float32 [N, F]."""
    names: tuple[str, ...]
    """Paths as they were given, or the names of the images in their data set."""
    classes: tuple[str, ...]
    """Class of each image, by its folder or its data set; "" for all where it is not known."""
    parts: tuple[str, ...] = ()
    """Of a data set: "train" or "val" for each image."""
    errors: tuple[str, ...] = ()
    """Images that were left out, and why."""
    about: dict[str, Any] = field(default_factory=dict)
    """Model and settings: plain values."""

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: str | Path) -> None:
        """Write an .npz or .parquet file; it appears when it is complete.

        npz: arrays `vectors`, `names`, `classes`, for data sets `parts`, and `volo`, a string of JSON that says how they
        were made. parquet: columns `vector`, `name`, `class`, `part`, and the same JSON in the metadata of the schema.

        Raises ValueError for another ending, ModuleNotFoundError for parquet without pyarrow, OSError.
        """
        path = Path(path)
        mark = json.dumps({"format": FORMAT, **self.about})
        if check_ending(path) == ".npz":
            arrays: dict[str, Any] = {"vectors": self.vectors, "names": _texts(self.names)}
            arrays["classes"] = _texts(self.classes)
            if self.parts:
                arrays["parts"] = _texts(self.parts)
            arrays[MARK] = np.array(mark)
            write_atomically(path, lambda file: np.savez(file, **arrays))
            return
        arrow, parquet = require_pyarrow(), import_module("pyarrow.parquet")
        flat = arrow.array(self.vectors.reshape(-1))
        columns = {"vector": arrow.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])}
        columns |= {"name": arrow.array(map(_utf8, self.names)), "class": arrow.array(map(_utf8, self.classes))}
        if self.parts:
            columns["part"] = arrow.array(self.parts)
        table = arrow.table(columns).replace_schema_metadata({MARK: mark})
        write_atomically(path, lambda file: parquet.write_table(table, file))


def embed(
    model: LoadedModel[Any] | str | Path,
    images: str | Path | Iterable[str | Path],
    *,
    pool: Pool = "concat",
    batch_size: int = 32,
    device: torch.device | str | None = None,
    amp: str = "off",
    on_progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Vectors of images, in their order; those that cannot be read are left out and named in `errors`.

    Args:
        model: a VOLO classifier as `volo.load` gives it, or what that takes.
        images: paths of files; a single string or path may be a folder or a glob, too (`find_pictures`).
        pool: "concat": class token, mean and maximum of the other tokens, one after another; "token": the class token.
        device: where the model is to run; None: where it is, and the CPU for one that is loaded here.
        amp: "off", "bf16" or "fp16": the type of autocast.
        on_progress: is called with (images done, images in all).

    An image's class is the name of its folder (`folder_classes`).
    Raises ValueError for what is no VOLO classifier, for options out of range and where no image can be read, and as
    `load` and `find_pictures` do.
    """
    _check_options(pool, batch_size, amp)
    loaded = volo_classifier(model, device=device)
    device = loaded.device if device is None else torch.device(device)
    paths = find_pictures([str(images)]) if isinstance(images, str | Path) else list(images)
    transform = eval_transform(loaded.preprocessing)
    pixels = PixelPipeline(loaded.preprocessing).to(device).eval()
    backbone = for_features(loaded.model, device)

    def prepare(path: str | Path) -> Tensor | str:
        try:
            return transform(decode_image(path))
        except (BadImageError, OSError) as error:
            return str(error)

    vectors: list[Tensor] = []
    names: list[str] = []
    errors: list[str] = []
    done = 0
    for batch in prepared_batches(paths, prepare, batch_size):
        errors += [image for _, image in batch if isinstance(image, str)]
        good = [(path, image) for path, image in batch if isinstance(image, Tensor)]
        if good:
            with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
                given = pixels(torch.stack([image for _, image in good]).to(device))
                found = backbone.pool(backbone.forward_features(given), pool).float().cpu()
            finite = found.isfinite().all(dim=1)
            errors += [
                f"{path}: {not_finite(amp)}" for (path, _), is_finite in zip(good, finite.tolist()) if not is_finite
            ]
            names += [str(path) for (path, _), is_finite in zip(good, finite.tolist()) if is_finite]
            vectors.append(found[finite])
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(paths))
    if not names:
        raise ValueError(
            "no image could be read:\n" + "\n".join(errors[:20]) if errors else "there are no images to embed"
        )
    classes = folder_classes(names, loaded.classes)
    about = describe(loaded, pool, amp)
    return Embeddings(torch.cat(vectors).numpy(), tuple(names), classes, errors=tuple(errors), about=about)


def embed_source(
    loaded: LoadedModel[VOLO],
    parts: dict[str, Any],
    *,
    pool: Pool = "concat",
    views: int = 1,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    amp: str = "off",
    on_progress: OnProgress | None = None,
) -> tuple[Embeddings, Tensor]:
    """Vectors of the images of labelled data, and those of all views, float32 [views, N, F] (`extract_features`).

    Args:
        parts: an `ImageSource` for each name of a part ("train", "val").
        on_progress: `on_progress(what, done, total)`.

    Raises ValueError, with the image's name, for vectors that are not finite.
    """
    _check_options(pool, batch_size, amp)
    device = loaded.device if device is None else torch.device(device)
    found, names, classes, of = [], [], [], []
    for part, source in parts.items():
        what = f"embedding {part}"
        features = extract_features(
            loaded.model,
            source,
            loaded.preprocessing,
            pool=pool,
            views=views,
            device=device,
            amp=amp,
            batch_size=batch_size,
            on_progress=None if on_progress is None else lambda done, total, what=what: on_progress(what, done, total),  # type: ignore[misc]
        )
        bad = (~features.isfinite().all(dim=2).all(dim=0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{source.names[bad[0]]}: {not_finite(amp)}")
        found.append(features)
        names += [source.names[i] for i in range(len(source))]
        classes += [source.classes[label] for label in source.targets.tolist()]
        of += [part] * len(source)
    features = torch.cat(found, dim=1)
    about = describe(loaded, pool, amp)
    return Embeddings(features[0].numpy(), tuple(names), tuple(classes), tuple(of), about=about), features


def volo_classifier(
    model: LoadedModel[Any] | str | Path,
    *,
    img_size: Any = None,
    crop: Crop | None = None,
    device: torch.device | str | None = None,
) -> LoadedModel[VOLO]:
    """The VOLO classifier that is meant, whose features can be had.

    Raises ValueError for segmentation models, models of timm and exported files, and as `load` does.
    """
    needed = (
        "vectors are made by a VOLO classifier: give a run folder or a checkpoint of `volo train`, or published weights such "
        "as volo_d1.224"
    )
    if not isinstance(model, LoadedModel):
        path = Path(model)
        if is_exported(path):
            raise ValueError(f"{model} is an exported file, which gives classes alone; {needed}")
        try:
            loaded = load(model, device=device or "cpu", img_size=img_size, crop=crop)
        except FileNotFoundError:
            if not path.exists() and _is_of_timm(str(model)):
                raise ValueError(f"{model} is a model of timm; {needed}") from None
            raise
        except ValueError:
            if img_size is None and crop is None:
                raise
            # It is said first that it is a segmentation model, then that some options are not for these.
            volo_classifier(model, device="meta")
            raise
    else:
        loaded = model
    if loaded.task == "segment":
        raise ValueError(f"{loaded.origin} is a segmentation model; {needed}")
    if not isinstance(loaded.model, VOLO):
        kind = "an exported file" if hasattr(loaded.model, "description") else f"a {type(loaded.model).__name__}"
        raise ValueError(f"{loaded.origin} is {kind}; {needed}")
    return loaded


def folder_classes(names: Sequence[str], known: Sequence[str] = ()) -> tuple[str, ...]:
    """The class of each image: its folder's name, if all folders are named like `known` classes, or if there are several
    that lie side by side; else "" for all."""
    folders = [Path(name).absolute().parent for name in names]
    several = len(set(folders)) > 1 and len({folder.parent for folder in folders}) == 1
    if several or {folder.name for folder in folders} <= set(known):
        return tuple(folder.name for folder in folders)
    return ("",) * len(names)


def standardised(vectors: Tensor) -> Tensor:
    """[N, F] -> float32 [N, F]: mean 0 and standard deviation 1 in every dimension, then length 1, so that products are
    cosines. What all images have in common, by far the most of a vector, does not make them alike then."""
    x = vectors.double()
    spread = x.std(dim=0, unbiased=False)
    x = (x - x.mean(dim=0)) / torch.where(spread > 1e-6, spread, torch.ones_like(spread))
    return torch.nn.functional.normalize(x, dim=1).float()


def nearest(vectors: Tensor, queries: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest other images of each of `queries` by cosine similarity of standardised vectors: similarities
    float32 and numbers int64, [len(queries), count], nearest first. `count` is at most N - 1."""
    unit = standardised(vectors)
    similarity = unit[list(queries)] @ unit.T
    similarity[torch.arange(len(queries)), torch.tensor(list(queries))] = -torch.inf
    values, indices = similarity.topk(min(count, len(vectors) - 1), dim=1)
    return values, indices


def is_ours(path: Path) -> bool:
    """Whether the file was written by `Embeddings.save`, by its content."""
    try:
        if check_ending(path) == ".npz":
            with zipfile.ZipFile(path) as archive:
                if f"{MARK}.npy" not in archive.namelist():
                    return False
            with np.load(path, allow_pickle=False) as file:
                mark = str(file[MARK])
        else:
            metadata = import_module("pyarrow.parquet").read_schema(path).metadata or {}
            mark = metadata.get(MARK.encode(), b"").decode()
        said = json.loads(mark)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    return isinstance(said, dict) and str(said.get("format", "")).startswith("volo embed ")


def check_ending(path: Path) -> str:
    """The ending of a file of vectors. Raises ValueError for one that is not known."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"vectors are written to a file that ends in {' or '.join(ENDINGS)}; given: {path}")
    return ending


def require_pyarrow() -> Any:
    try:
        return import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a .parquet file needs pyarrow: pip install pyarrow, or write an .npz file", name="pyarrow"
        ) from error


def describe(loaded: LoadedModel[VOLO], pool: Pool, amp: str) -> dict[str, Any]:
    """How vectors were made; those of equal descriptions can be compared."""
    data = loaded.preprocessing
    size = data.img_size if isinstance(data.img_size, int) else list(data.img_size)
    return {
        "model": loaded.origin,
        "weights": weights_digest(loaded.model),
        "pool": pool,
        "amp": amp,
        "img_size": size,
        "crop_pct": data.crop_pct,
        "mean": list(data.mean),
        "std": list(data.std),
    }


def data_config(loaded: LoadedModel[VOLO], path: str | Path | None) -> Any:
    """How the data set at `path` (None: that of the model's own training) is opened: with the model's own split where it is
    that of the training, else as its layout says. Images that cannot be decoded are left out.

    Raises ValueError where the model knows of no data, and for the table of a model of several outputs: images of a data set
    have one class.
    """
    data = dataclasses.replace(loaded.preprocessing, on_bad_image="skip", check="full")
    is_own = path is None or bool(
        data.path and Path(path).expanduser().resolve() == Path(data.path).expanduser().resolve()
    )
    if loaded.task == "table":
        outputs = loaded.targets.outputs
        if is_own and data.path and (len(outputs) > 1 or outputs[0].kind != "class"):
            raise ValueError(
                f"{data.path} says of its images {', '.join(f'{it.name} ({it.kind})' for it in outputs)}, and images of a data set "
                "have one class here: give a table with one label column or class folders with --data, or the images "
                "themselves (PICTURE...) in place of a data set"
            )
        if not is_own:  # those columns are the model's, not those of another table
            data = dataclasses.replace(data, label_columns=(), label_kinds=())
    if path is None:
        if not data.path and data.kind == "auto":
            raise ValueError("these weights come without images; name a data set with --data")
        return data
    if is_own:
        return data
    splits = data.splits if data.splits == "none" else "auto"
    return dataclasses.replace(data, path=str(Path(path).expanduser()), kind="auto", splits=splits)


def _check_options(pool: str, batch_size: int, amp: str) -> None:
    if pool not in get_args(Pool) or batch_size < 1 or amp not in AMP_DTYPES:
        raise ValueError(
            f"pool is {' or '.join(get_args(Pool))}, batch_size at least 1 and amp one of {', '.join(AMP_DTYPES)}; given: "
            f"{pool!r}, {batch_size}, {amp!r}"
        )


def _is_of_timm(name: str) -> bool:
    try:
        timm = import_module("timm")
    except ImportError:
        return False
    return bool(timm.is_model(name))


def _texts(texts: Sequence[str]) -> np.ndarray:
    return np.array(texts, dtype=np.str_)


def _utf8(text: str) -> str:
    """What is no text in a file name is written as JSON escapes it."""
    return text.encode(errors="backslashreplace").decode()
