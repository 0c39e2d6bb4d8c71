"""Name the pixels of images: index masks, coloured overlays, areas; large images piece by piece in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from volo.config import Size
from volo.data.decode import BadImageError, decode_image
from volo.data.files import write_atomically
from volo.data.mask_transforms import scale_to, scaled_size
from volo.data.mask_values import CITYSCAPES, Colour, is_background
from volo.data.splits import IMAGE_FOLDERS, MASK_FOLDERS
from volo.data.transforms import PixelPipeline, height_width
from volo.data.walk import list_folder
from volo.inference.evaluate import AMP_DTYPES
from volo.inference.model_source import LoadedModel
from volo.inference.segment_evaluate import NOT_FINITE, HowToTest, log_probabilities
from volo.inference.windows import resized_strips, window_logits
from volo.models.segmenter import Segmenter

WHOLE_PIXELS = 1 << 20
"""Images of up to so many pixels are seen whole unless the user asks for windows."""
WINDOW = 512
"""Side of windows at the least: below, too little of the surroundings is seen."""
OPACITY = 0.55
FONTS = [
    Path(p) for p in ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "C:/Windows/Fonts", "~/.fonts")
]
"""Where a font is looked for whose characters class names need."""
AREAS = "areas.json"
SOFTWARE = "volo segment"
"""What masks and overlays name as their author."""


@dataclass(frozen=True)
class Segmented:
    """What the pixels of an image show; for an image that could not be read `error` says why."""

    name: str
    classes: np.ndarray
    """uint8 [H, W]: the class of each pixel."""
    image: Tensor
    """uint8 [3, H, W]."""
    error: str | None = None

    @property
    def areas(self) -> list[int]:
        """Pixels of each class number, up to the highest that occurs."""
        return np.bincount(self.classes.ravel()).tolist()


def default_window(classifier: LoadedModel[Segmenter], size: tuple[int, int]) -> HowToTest:
    """How an image of so many pixels is looked at where nobody says: whole if it is small, else by windows."""
    if (how := HowToTest.of_file(classifier.model)) is not None:
        return how
    if size[0] * size[1] <= WHOLE_PIXELS:
        return HowToTest()
    crop = height_width(classifier.preprocessing.img_size)
    window = (max(WINDOW, crop[0]), max(WINDOW, crop[1]))
    return HowToTest.by_windows(window)


def segment(
    classifier: LoadedModel[Segmenter],
    pictures: Iterable[str | Path],
    *,
    how: HowToTest | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    as_scored: bool = False,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    amp: str = "off",
    on_window: Callable[[int, int], None] | None = None,
) -> Iterator[Segmented]:
    """The class of each pixel of each image, at the image's own size, one image after the other.

    Windows overlap and are blended smoothly, strip by strip: besides the image and its answer (4 bytes a pixel) memory
    holds one row of windows (a column of wide images). Scales and mirror images are those of each window.

    Args:
        how: windows, scales, mirror images; None: whole for small images, else windows (`default_window`).
        scales, flip: as in `HowToTest`, where `how` is None.
        as_scored: as `evaluate_segmentation` does it: the scaled image is cut into windows, which are averaged evenly.
            The probabilities of the whole image are kept in memory.
        batch_size: windows that pass the model at once.
        amp: "off", "bf16" or "fp16": the type of autocast.
        on_window: called with (windows done, windows of this image).

    An image that cannot be read gives a `Segmented` with `error`. Raises ValueError, naming the image, where the model's
    answer is not finite.
    """
    if amp not in AMP_DTYPES:
        raise ValueError(f"amp is one of {', '.join(AMP_DTYPES)}; given: {amp!r}")
    device = torch.device(device)
    pixels = PixelPipeline(classifier.preprocessing).to(device).eval()
    for path in pictures:
        try:
            image = decode_image(path)
        except BadImageError as error:
            yield Segmented(str(path), np.zeros((0, 0), np.uint8), torch.zeros(3, 0, 0, dtype=torch.uint8), str(error))
            continue
        size = (image.shape[1], image.shape[2])
        scaled = scaled_size(*size, classifier.segment.short_side)
        chosen = how or dataclasses.replace(default_window(classifier, scaled), scales=tuple(scales), flip=flip)
        images = scale_to(image, scaled)[None]
        with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            try:
                if as_scored:
                    log_probs = log_probabilities(classifier.model, pixels(images.to(device)), size, chosen, batch_size)
                    classes = _best(log_probs).numpy()
                else:
                    classes = _classes(classifier.model, images, size, chosen, pixels, batch_size, device, on_window)
            except FloatingPointError as error:
                raise ValueError(f"{path}: {error}; {NOT_FINITE}") from None
        yield Segmented(str(path), classes, image)


def _classes(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    size: tuple[int, int],
    how: HowToTest,
    pixels: nn.Module,
    batch_size: int,
    device: torch.device,
    on_window: Callable[[int, int], None] | None,
) -> np.ndarray:
    """uint8 [*size] from one image, uint8 [1, 3, h, w]. Raises FloatingPointError for answers that are not finite."""
    if images.shape[-1] > images.shape[-2] and how.window is not None:
        # From left to right, turned: a row of windows, which memory holds, is then as short as it can be.
        def turned(crops: Tensor) -> Tensor:
            return model(crops.transpose(-1, -2).contiguous()).transpose(-1, -2)

        how = dataclasses.replace(how, window=how.window[::-1], stride=how.steps[::-1])
        images, size = images.transpose(-1, -2), size[::-1]
        return _classes(turned, images, size, how, pixels, batch_size, device, on_window).T
    scaled = (images.shape[-2], images.shape[-1])
    window, stride = (how.window, how.steps) if how.window is not None else (scaled, scaled)
    views = dataclasses.replace(how, window=None, stride=None)

    def averaged(crops: Tensor) -> Tensor:
        # Probabilities, not their logarithms, which may be infinite: they are blended and interpolated.
        return log_probabilities(model, crops, (crops.shape[-2], crops.shape[-1]), views).exp_()

    answer = torch.empty(size, dtype=torch.uint8)
    strips = window_logits(
        model if views == HowToTest() else averaged,
        images,
        window,
        stride,
        pixels=pixels,
        smooth=True,
        batch_size=batch_size,
        device=device,
        on_window=on_window,
    )
    if scaled != size:
        # The image was scaled for the model: logits are scaled back, not the numbers of classes.
        strips = resized_strips(strips, scaled[0], size)
    for top, logits in strips:
        answer[top : top + logits.shape[2]] = _best(logits)
        del logits  # before the next strip is made
    return answer.numpy()


def _best(logits: Tensor) -> Tensor:
    """uint8 [H, W] on the CPU, from [1, K, H, W]; raises FloatingPointError where it is not finite."""
    best = logits[0].max(0)
    # NaN is the greatest of all; so is an infinity, unless all are infinitely small.
    if not best.values.isfinite().all():
        raise FloatingPointError("the model's answer is not finite (NaN or infinity)")
    return best.indices.to("cpu", torch.uint8)


# Files


def write_mask(path: Path, classes: np.ndarray, colours: Sequence[Colour]) -> None:
    """A PNG whose pixel values are class numbers; its palette shows them in their colours."""
    image = Image.fromarray(classes)
    image.putpalette([channel for colour in colours for channel in colour])
    _write_png(path, image)


def write_cityscapes(path: Path, classes: np.ndarray) -> None:
    """A PNG of Cityscapes' label ids (not train ids), as its benchmark takes it."""
    ids = np.zeros(256, np.uint8)
    ids[: len(CITYSCAPES)] = [label_id for _, label_id, _ in CITYSCAPES]
    _write_png(path, Image.fromarray(ids[classes]))


def cityscapes_name(picture: str | Path) -> str:
    """The file name the benchmark looks for: CITY_SEQUENCE_FRAME*.png."""
    return f"{Path(picture).stem.removesuffix('_leftImg8bit')}_pred_labelIds.png"


def blend(
    image: Tensor,
    classes: np.ndarray,
    colours: Sequence[Colour],
    opacity: float = OPACITY,
    *,
    plain: int | None = None,
    outlines: bool = False,
) -> np.ndarray:
    """The image uint8 [3, H, W] under the colours of its classes: uint8 [H, W, 3], strip by strip.

    The class `plain` is left as it is. `outlines`: pixels where a segment ends have its full colour.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    strength = np.full((256, 1), opacity, np.float32)
    if plain is not None:
        strength[plain] = 0
    pixels = image.permute(1, 2, 0).numpy()
    mixed = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(mixed), 256):
        rows = slice(top, top + 256)
        its = classes[rows]
        share = strength[its]
        if outlines:
            above = max(0, top - 1)
            edge = _edges(classes[above : top + 257])[top - above :][: len(its)]
            share[edge if plain is None else edge & (its != plain)] = 1
        mixed[rows] = (1 - share) * pixels[rows] + share * table[its] + 0.5
    return mixed


def _edges(classes: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels with another class beside, above or below them."""
    edge = np.zeros(classes.shape, bool)
    differs = classes[1:] != classes[:-1]
    edge[1:] |= differs
    edge[:-1] |= differs
    differs = classes[:, 1:] != classes[:, :-1]
    edge[:, 1:] |= differs
    edge[:, :-1] |= differs
    return edge


def write_overlay(
    path: Path,
    image: Tensor,
    classes: np.ndarray,
    names: Sequence[str],
    colours: Sequence[Colour],
    opacity: float = OPACITY,
) -> None:
    """A PNG of the image under the colours of its classes, with outlines, but for a background; below it the names and
    shares of those that occur."""
    plain = 0 if names and is_background(names[0]) else None
    mixed = Image.fromarray(blend(image, classes, colours, opacity, plain=plain, outlines=True))
    areas = np.bincount(classes.ravel(), minlength=len(names))
    order = [int(i) for i in np.argsort(-areas, kind="stable") if areas[i]]
    size = max(11, min(48, round(0.016 * max(mixed.size))))
    font, labels = _legend_font([names[i] for i in order], size)
    labels = labels or [f"class {i}" for i in order]  # areas.json says which that is
    entries = [f"{label}  {_percent(areas[i] / classes.size)}" for label, i in zip(labels, order)]
    wide = max(int(font.getlength(entry)) for entry in entries) + 3 * size
    columns = max(1, mixed.width // wide)
    rows = -(-len(entries) // columns)
    line = round(1.6 * size)
    sheet = Image.new("RGB", (mixed.width, mixed.height + rows * line + size), "white")
    sheet.paste(mixed, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for place, (i, entry) in enumerate(zip(order, entries)):
        column, row = divmod(place, rows)
        x, y = column * (mixed.width // columns) + size // 2, mixed.height + size // 2 + row * line
        box = (x, y + size // 4, x + size, y + size // 4 + size)
        draw.rectangle(box, fill=None if i == plain else tuple(colours[i]), outline="#555555")
        draw.text((x + round(1.6 * size), y + size // 4 + size // 2), entry, fill="#22282f", font=font, anchor="lm")
    _write_png(path, sheet)


def _legend_font(names: Sequence[str], size: int) -> tuple[Any, list[str]]:
    """A font that has the characters of all names, and the names as it draws them; without one no names."""
    shown = [name.encode(errors="replace").decode() for name in names]  # file names need not be text
    default = ImageFont.load_default(size)
    for font in itertools.chain([default], _system_fonts(size)):
        missing = font.getmask("\U0010ffff")
        if all(bytes(font.getmask(c)) != bytes(missing) for c in set("".join(shown)) if not c.isspace()):
            return font, shown
    return default, []


def _system_fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    for folder in FONTS:
        for path in sorted(folder.expanduser().rglob("*.[to]t[fc]")):
            with contextlib.suppress(OSError):
                yield ImageFont.truetype(path, size)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def areas_json(result: Segmented, names: Sequence[str], files: dict[str, str]) -> dict[str, Any]:
    """Pixels and share of each class that occurs, largest first, as JSON takes it."""
    if result.error:
        return {"picture": result.name, "error": result.error}
    H, W = result.classes.shape
    areas = sorted(((count, i) for i, count in enumerate(result.areas) if count), reverse=True)
    return {
        "picture": result.name,
        "width": W,
        "height": H,
        **files,
        "areas": [{"class": names[i], "index": i, "pixels": n, "share": round(n / (H * W), 6)} for n, i in areas],
    }


def output_names(pictures: Sequence[Path]) -> list[str]:
    """A name for the files of each image: its stem, with as many of its folders as it takes to tell all apart."""
    names = [path.stem for path in pictures]
    depth = 1
    while len(set(names)) < len(names) and depth < max((len(p.parts) for p in pictures), default=0):
        depth += 1
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "__".join([*(part.strip("/.") for part in path.parts[-depth:-1]), path.stem]) if name in twice else name
            for name, path in zip(names, pictures)
        ]
    if len(set(names)) < len(names):  # a.jpg beside a.png
        names = [path.name.replace(".", "_") if names.count(name) > 1 else name for name, path in zip(names, pictures)]
    if len(set(names)) < len(names):
        raise ValueError("the results of some images would have identical names; segment them separately")
    return names


def output_files(
    pictures: Sequence[Path], out: Path, *, cityscapes: bool = False, overlays: bool = True
) -> list[dict[str, str]]:
    """Names in `out` of each image's files: "mask", and "overlay" if wanted; none of them is written yet.

    For Cityscapes there are masks alone: its script takes whatever is named like an image for a prediction.
    Raises ValueError where a file would replace an image, or one of another image.
    """
    if cityscapes:
        files = [{"mask": cityscapes_name(path)} for path in pictures]
    else:
        files = [
            {"mask": f"{stem}.png"} | ({"overlay": f"{stem}_overlay.png"} if overlays else {})
            for stem in output_names(pictures)
        ]
    inputs = {path.resolve(): path for path in pictures}
    taken: dict[str, Path] = {}
    for path, names in zip(pictures, files):
        for name in names.values():
            target = out / name
            if (picture := inputs.get(target.resolve())) is not None:
                raise ValueError(
                    f"{target}, a result of {path}, would replace the image {picture}; choose another --out"
                )
            if name in taken:
                raise ValueError(f"{taken[name]} and {path} would both write {target}; segment them separately")
            taken[name] = path
    return files


def is_result(path: Path) -> bool:
    """A mask or an overlay that `volo segment` wrote, by what the file says."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):
        return False


def masks_beside_images(pictures: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    """Those of `pictures`, found in `folders`, that lie in masks/ (annotations/, labels/) with images/ next to it."""

    def is_of_masks(place: Path) -> bool:
        return any(
            parent.name.lower() in MASK_FOLDERS
            and any(name.lower() in IMAGE_FOLDERS for name in list_folder(parent.parent)[0])
            for folder in folders
            if place.is_relative_to(folder)
            for parent in (place, *place.parents)
            if parent != folder and parent.is_relative_to(folder)
        )

    places = {place for place in {path.parent for path in pictures} if is_of_masks(place)}
    return [path for path in pictures if path.parent in places]


def earlier_areas(
    out: Path, pictures: Sequence[Path], targets: Sequence[dict[str, str]], classifier: LoadedModel[Segmenter]
) -> list[dict[str, Any]]:
    """What areas.json in `out` says of other images than these, from earlier calls; nothing is written.

    Raises ValueError where one of `targets` (of `output_files`) or areas.json is there and is nobody's result of
    `volo segment`, and where the results there are of a model with other classes.
    """
    areas, content = out / AREAS, None
    if areas.exists():
        try:
            content = json.loads(areas.read_text(encoding="utf-8"))
            entries = [entry | {"model": entry.get("model", content["model"])} for entry in content["pictures"]]
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise ValueError(
                f"{areas} was not written by volo segment: choose another --out, or move it away"
            ) from None
    else:
        entries = []
    written = {entry[kind] for entry in entries for kind in ("mask", "overlay") if kind in entry}
    for names in targets:
        for name in names.values():
            if (out / name).exists() and name not in written and not is_result(out / name):
                raise ValueError(
                    f"{out / name} was not written by volo segment, and a result would replace it: choose another --out, or move it away"
                )
    ours = {str(path) for path in pictures} | {name for names in targets for name in names.values()}
    kept = [entry for entry in entries if not ours & {entry["picture"], entry.get("mask"), entry.get("overlay")}]
    if content and kept and [c["class"] for c in content["classes"]] != list(classifier.classes):
        raise ValueError(
            f"{out} holds results of a model with other classes ({content['model']}): choose another --out, or move them away"
        )
    return kept


def _write_png(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer, said = io.BytesIO(), PngInfo()
    said.add_text("Software", SOFTWARE)
    image.save(buffer, format="PNG", compress_level=4, pnginfo=said)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def areas_text(entries: Sequence[dict[str, Any]], classifier: LoadedModel[Segmenter], how: str) -> str:
    """What areas.json says: the model, its classes and colours, and the areas in each image (of another model where an
    entry names one)."""
    content = {
        "model": classifier.origin,
        "test": how,
        "classes": [
            {"index": i, "class": name, "colour": list(colour)}
            for i, (name, colour) in enumerate(zip(classifier.classes, classifier.colours))
        ],
        "pictures": [
            {key: value for key, value in entry.items() if (key, value) != ("model", classifier.origin)}
            for entry in entries
        ],
    }
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()


def write_areas(out: Path, text: str) -> None:
    write_atomically(out / AREAS, lambda file: file.write(text.encode()))


def how_to_test(
    default: HowToTest | None,
    *,
    window: Size | None,
    stride: Size | None,
    scales: Sequence[float],
    flip: bool,
) -> HowToTest | None:
    """What the options of a command line ask for; `default` where they leave the window open."""
    if window is None and stride is not None:
        raise ValueError("--stride is from window to window: give --window too")
    wanted = tuple(scales) or (1.0,)
    if window == 0:
        return HowToTest(scales=wanted, flip=flip)
    if window is not None:
        return HowToTest.by_windows(window, stride or 0, scales=wanted, flip=flip)
    return None if default is None else dataclasses.replace(default, scales=wanted, flip=flip)
