"""Recipes: one TOML file describes one run, and these dataclasses are its grammar.

A recipe is the artefact of an experiment. The command line only overrides single keys of it
(``--optim.lr 1e-3``), and the resolved recipe is stored with every run and every checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Size = int | tuple[int, int]
"""A side in pixels, or height and width."""


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def read_size(name: str, words: Sequence[int] | None, least: int = 1) -> Size | None:
    """One number, or two, as they come from a command line. Raises ValueError that speaks of `name`."""
    if words is None:
        return None
    if len(words) not in (1, 2) or min(words) < least:
        raise ValueError(f"{name} is one number of pixels, or height and width; given: {' '.join(map(str, words))}")
    return words[0] if len(words) == 1 else (words[0], words[1])


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and where its first weights come from."""

    name: str = "volo_d1"
    """Name of `volo.list_models()`; for task "segment" of `volo.list_segmenters()`."""
    weights: str = ""
    """Start from these: "pretrained" (our own of volo_nano and volo_tiny, else the published ones at 224), a tag
    ("volo_d1.224"), a run folder, or a file; empty: from scratch."""
    probe: bool = False
    """Fit the class head to frozen features of the training images first, by a regression whose penalty is chosen in
    cross-validation, and train everything from there (LP-FT, arXiv 2202.10054); with schedule.epochs 0 that is all."""
    drop_path_rate: float | None = None
    """Stochastic depth at the last block, rising linearly from 0; None: the variant's own (paper, Table 2)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other argument of `volo.create_model` or `volo.create_segmenter`, e.g. depths, embed_dims, patch_size, channels."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, in which size."""

    path: str = ""
    """Folder (train/ and val/ of one folder a class, or one folder split by `split_seed`), tar shards (a folder with
    train-*.tar and val-*.tar, or train-{000000..000127}.tar), npz folder, or a table of images and labels (labels.csv);
    empty for what needs none (`kind`)."""
    kind: Literal["auto", "folder", "tar", "cifar10", "cifar100", "npz", "digits", "table"] = "auto"
    """How `path` is read; "auto" looks at what is there. Without a path: "digits", scikit-learn's handwritten digits, or
    "cifar10" or "cifar100", which are downloaded."""
    img_size: Size = 224
    """Side in pixels, or height and width."""
    max_upscale: float = 0.0
    """Factor by which small images are scaled up at most: where the median of their shorter sides, times this, is below img_size,
    a run takes the next multiple of 32 in its place (64 at least), and keeps it in its recipe. 0: img_size holds."""
    splits: str = "auto"
    """Which folders or files are for training and which are held out: "auto" goes by their names (train, training_set,
    val, valid, dev, test, ...); "none": all is one set, and every folder a class; "NAME,NAME": these two."""
    val_fraction: float = 0.1
    """Share of each class that is held out where the data has no split of its own."""
    split_seed: int = 0
    """Seed of that split: the same seed holds out the same images."""
    root: str = ""
    """Of a table: the folder that its paths are relative to; empty: the table's own."""
    image_column: str = ""
    """Of a table: the column with the images' paths; empty: the one called path, image, file, filename, ..."""
    label_columns: tuple[str, ...] = ()
    """Of a table: the columns to learn; empty: the one called label, class, category, ..., or the only other one."""
    label_kinds: tuple[Literal["class", "labels", "number"], ...] = ()
    """What each of `label_columns` holds: a class, several labels, or a number; empty: by what is in the cells."""
    split_column: str = ""
    """Of a table: the column that says train, val, test, ...; empty: the one called split, subset or fold, if there is one."""
    label_separator: str = "auto"
    """Between the labels of a cell; "auto": ";" or "|"; "none": a cell is one label, whatever is in it."""
    crop_pct: float = 0.96
    """Test time: the image is resized to img_size / crop_pct, then the centre is cropped; above 1 pads (the original's 1.15)."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "random"
    """Resampling in training ("random": bilinear or bicubic per image, as in the paper); tests are bicubic unless "bilinear"."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, subtracted from pixels in 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, divides after `mean`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A file that cannot be decoded stops the run before training (all of them are named), or is left out."""
    check: Literal["full", "off"] = "full"
    """"full": every image is decoded once before the training; "off": none is, and what is wrong shows while training."""
    cache: Literal["auto", "ram", "none"] = "auto"
    """Keep decoded images in memory; "auto" does so when they are small and fit easily."""
    num_workers: int = -1
    """Processes that decode and augment; -1 chooses from the data and the cores; 0: in the training process."""
    timeout: float = 600.0
    """Seconds that a batch may take to come from these processes before the run ends with a message; 0: no limit."""


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image. Randomness depends on (seed, epoch, image) alone."""

    crop: Literal["resized", "pad", "none"] = "resized"
    """"resized": random area and aspect, then scaled (ImageNet); "pad": shifted by up to `pad` pixels (CIFAR); "none": resize only."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the area that a "resized" crop keeps."""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect ratios of a "resized" crop."""
    pad: int = 4
    """Pixels of reflected border for "pad"."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    rand_augment: str = ""
    """For example "rand-m9-mstd0.5-inc1" (the paper's); empty: none."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter (not used together with rand_augment)."""
    erase_prob: float = 0.0
    """Probability that a random rectangle is replaced (random erasing)."""
    erase_mode: Literal["pixel", "const"] = "pixel"
    """Fill of the erased rectangle: normal noise per pixel (the paper's), or zero after normalisation (cutout)."""
    erase_scale: tuple[float, float] = (0.02, 0.3333333333333333)
    """Area of the erased rectangle as a share of the image."""
    mixup: float = 0.0
    """Beta parameter of mixup; 0: off."""
    cutmix: float = 0.0
    """Beta parameter of CutMix; 0: off."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed by mixup or CutMix at all."""
    mix_token: float = 0.0
    """Beta parameter of MixToken (1.0 in the paper); 0: off. Not together with mixup or CutMix."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    label_smoothing: float = 0.1
    """Probability mass spread over all classes."""
    token_weight: float = 0.0
    """Weight of the loss of the aux head on every token, with the image's own (mixed) label as the token's target;
    0: the token logits are trained only through the maximum that joins the class logits."""


@dataclass(frozen=True)
class SegmentConfig:
    """Semantic segmentation (task "segment"): a class for every pixel. Crops are of data.img_size."""

    layout: Literal["auto", "folders", "cityscapes"] = "auto"
    """"folders": images/ and annotations/ (ADE20K, CamVid, your own); "cityscapes": leftImg8bit/ and gtFine/."""
    train_split: str = "train"
    """Images to learn from: a folder in images/, or the names in SPLIT.txt. "train" is also found as "training"."""
    val_split: str = "val"
    """Images to score on during the training; "val" is also found as "validation"."""
    num_classes: int = 0
    """0: those of classes.csv, classes.txt or objectInfo150.txt beside the images, or Cityscapes' 19; masks of 0 and 255, or
    0 and 1, need none of them."""
    object_value: int = -1
    """Of two classes, the background and an object: the value of the object in masks, 1 or 255; -1: understood from the masks
    (0 and 255 alone: 255; otherwise 1, and 255 is void)."""
    reduce_zero_label: bool = False
    """0 in a mask is background or void and is left out; class k is stored as k + 1 (ADE20K)."""
    ignore_label: int = 255
    """Value in masks that means void, besides 255: left out of loss and score (CamVid as given here: 11)."""
    short_side: int = 0
    """Images are first scaled to this shorter side, in training and testing (ADE20K: 512); 0: as they are."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Training images are scaled by a random factor in this range, before the crop."""
    cat_max_ratio: float = 0.75
    """A crop in which one class has a larger share is redrawn up to ten times; 1: off."""
    photometric: float = 1.0
    """Strength of random brightness, contrast, saturation and hue; 1: as torchvision's RandomPhotometricDistort after SSD (but
    channels keep their places), 0: off."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    class_weights: Literal["none", "median", "log"] = "none"
    """Weights of classes in the loss, from their share of the training pixels: "median": median share / share (Eigen and
    Fergus, arXiv 1411.4734), "log": 1 / ln(1.02 + share) (ENet, arXiv 1606.02147), scaled to mean 1."""
    ohem: float = 0.0
    """Online hard example mining: only pixels whose true class has a probability below this count (usual: 0.7); 0: off."""
    ohem_min_kept: int = 100_000
    """Minimum number of pixels kept per image, the hardest ones."""
    test: Literal["whole", "slide"] = "whole"
    """Score images in one piece, or by overlapping windows."""
    window: Size = 0
    """Window of "slide": side in pixels, or height and width; 0: data.img_size."""
    stride: Size = 0
    """Step between windows, in pixels; 0: two thirds of the window."""


@dataclass(frozen=True)
class TableConfig:
    """Several labels an image, numbers, or several of these at once (task "table"), from a table of images (data.path)."""

    number_loss: Literal["huber", "mse"] = "huber"
    """Loss of numbers, which are standardised first: Huber's, squared up to one standard deviation and linear beyond, or
    the mean squared error."""
    weights: tuple[float, ...] = ()
    """Weights of the outputs in the loss, in their order; empty: 1 each."""


@dataclass(frozen=True)
class TokenLabelConfig:
    """Token labels (task "token_label"): every token of an image has a soft label of its own, from an annotator."""

    source: Literal["maps", "live", "own"] = "maps"
    """"maps": label maps generated beforehand; "live": the annotator looks at every crop during the training, nothing is
    stored; "own": no annotator, every token has the label of its image."""
    maps: str = ""
    """Label maps of `volo annotate`. With an [annotator]: generated there first, if they are not there yet; empty: in the
    run folder."""
    crop_order: Literal["corrected", "original"] = "corrected"
    """"original" swaps rows and columns of a crop, as the paper's tool did, and crops after flip and RandAugment."""
    cls_weight: float = 1.0
    """Weight of the class token's loss."""
    dense_weight: float = 0.5
    """Weight of the mean loss of the other tokens."""
    ground_truth: bool | Literal["only"] = False
    """True: mix the true class into the class token's label (fine-tuning): half where the annotator agrees with it, else a
    tenth. "only": the class token learns the true class alone, and the annotator teaches the other tokens."""


@dataclass(frozen=True)
class AnnotatorConfig:
    """Who generates the label maps, and how: options of `volo annotate`, and a section of recipes (task "token_label"), where
    `volo train` does this before the training itself."""

    recipe: str = ""
    """Train the annotator first, by this recipe (a file, or the name of one that ships) on the same images."""
    model: str = ""
    """A model of timm (resnet50.a1_in1k, dm_nfnet_f6, ...), a run folder or checkpoint of volo train, or published
    weights such as volo_d1.224."""
    weights: str = ""
    """Weights of a timm model, in place of its published ones, which are downloaded."""
    img_size: Size = 0
    """What the annotator sees, in pixels, or height and width: larger images give finer maps; 0: its own size."""
    crop: float | Literal["squash"] = "squash"
    """"squash": the whole image, whatever its shape, so that the map covers all of it; a share such as 0.96: a centre crop,
    which the map then covers (not live)."""
    top: int = 5
    """Classes kept for each position."""
    encoding: Literal["exact", "compact"] = "exact"
    """exact: logits as float16. compact: to the nearest 0.1, which moves no probability by more than 0.025."""
    flip: bool = False
    """Average the logits with those of the mirrored image; takes twice the time."""
    batch_size: int = 64
    """Images at once."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast to bfloat16 or float16."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings. Optimizers are timm's (`timm.optim.list_optimizers()`)."""

    name: str = "adamw"
    lr: float = 0.0
    """Peak learning rate; 0: base_lr * batch_size / base_batch_size."""
    base_lr: float = 1.6e-3
    """Peak learning rate at a global batch of `base_batch_size`; scales with the batch, as do warmup_lr and min_lr."""
    base_batch_size: int = 1024
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Learning rate factor from each layer to the one below it (fine-tuning: 0.65 to 0.9); 1: off."""
    momentum: float = 0.9
    """For optimizers that have one."""
    clip_grad: float = 0.0
    """Gradient norm above which gradients are scaled down; 0: off."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are evaluated and exported; 0: no average."""
    ema_warmup: bool = True
    """Let the decay rise from 0 in the first steps, so that short runs forget their random start."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate goes: linear warm-up, cosine (line, power) down to the minimum, cool-down there."""

    epochs: float = 300
    """Passes over the training images, warm-up included, cool-down not; with `minutes` the most there will be."""
    minutes: float = 0.0
    """Time limit in minutes, preparation included: speed is measured once, and the epochs that fit go into the run's
    recipe, so that a continued run is the same run. 0: no limit."""
    warmup_epochs: float = 20
    cooldown_epochs: float = 10
    steps: int = 0
    """Optimizer steps instead, as segmentation counts, warm-up included; the epochs above then do not matter. 0: epochs."""
    warmup_steps: int = 0
    """Warm-up where `steps` counts."""
    decay: Literal["cosine", "linear", "poly"] = "cosine"
    """From the peak to min_lr; "linear" is "poly" with power 1."""
    power: float = 1.0
    """Of "poly": what is above min_lr goes with (share of the steps left) ** power; 0.9 is usual in segmentation."""
    decay_begins: Literal["after_warmup", "at_start"] = "after_warmup"
    """Where the decay counts from. "at_start": from the first step, so that the warm-up ends on a curve that has come down
    already; timm's scheduler and the original's ImageNet runs count so."""
    changes: Literal["every_step", "every_epoch"] = "every_step"
    """When the learning rate changes. "every_epoch": constant within an epoch, at the value of its first step, as in the
    original's ImageNet runs."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Learning rate at the end of the decay."""
    small_size: Size = 0
    """Progressive resizing: side (or height and width) that training images are shrunk to in the first `small_epochs`;
    most of what is learned early does not need the detail, and costs less without. 0: data.img_size from the start."""
    small_epochs: int = 0
    """How many of the epochs, from the first on, see images of `small_size`."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    batch_size: int = 1024
    """Images in an optimizer step, over all processes and accumulated micro batches."""
    accumulation: int = 1
    """Micro batches a step is split into, for less memory."""
    device: str = "auto"
    """"auto": cuda where there is one, else cpu."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast in the forward pass; fp16 scales the loss."""
    compile: bool = False
    """torch.compile the task."""
    channels_last: bool = False
    """Memory format of images and convolutions."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: replicate the weights, or shard them (FSDP2, for D5 on small GPUs)."""
    batch_norm: Literal["train", "sync", "frozen"] = "train"
    """Statistics of BatchNorm: each process's own, synchronised over processes, or fixed (task "segment": those of the
    backbone; neck and decoder, which start afresh, have each process's own)."""
    seed: int = 0
    deterministic: bool = True
    """Ask torch for deterministic kernels: the same seed gives the same weights."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    eval_every: float = 1.0
    """Epochs between evaluations on the held-out images; the last epoch is always evaluated."""
    eval_steps: int = 0
    """Optimizer steps between evaluations instead of `eval_every`; 0: epochs count."""
    eval_batch_size: int = 0
    """Per process; 0: batch_size / accumulation / processes."""
    checkpoint_minutes: float = 5.0
    """Minutes between saves inside an epoch; every evaluation saves too."""
    tensorboard: bool = True
    """Write TensorBoard files when the package is installed; metrics.jsonl is always written."""


@dataclass(frozen=True)
class Recipe:
    """One run, complete: `volo train recipes/NAME.toml --optim.lr 1e-3`."""

    task: Literal["classify", "token_label", "segment", "table"] = "classify"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    table: TableConfig = field(default_factory=TableConfig)
    token_label: TokenLabelConfig = field(default_factory=TokenLabelConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def lr_scale(self) -> float:
        """What learning rates of the schedule are multiplied by: the linear scaling rule, unless optim.lr is set."""
        if self.optim.base_batch_size < 1:
            raise ValueError(f"optim.base_batch_size is {self.optim.base_batch_size}; it is a number of images")
        return 1.0 if self.optim.lr else self.train.batch_size / self.optim.base_batch_size

    @property
    def peak_lr(self) -> float:
        return self.optim.lr or self.optim.base_lr * self.lr_scale

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers: what JSON, TOML and checkpoints hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """A `Recipe` from nested dicts; the inverse of `Recipe.to_dict`.

    Raises ValueError for unknown keys (naming the nearest) and for values of the wrong type.
    """
    return _build(Recipe, values, "")


def find_recipe(name: str | Path) -> Path:
    """The file behind what a user calls a recipe: a path that exists, else the name of one that ships with the package
    ("digits", "digits.toml" or "recipes/digits.toml").

    Raises FileNotFoundError, listing the recipes there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {recipe.stem: recipe for recipe in list_recipes()}
    if path.parent in (Path(), Path("recipes")) and path.name.removesuffix(".toml") in shipped:
        return shipped[path.name.removesuffix(".toml")]
    beside = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent != Path() else []
    raise FileNotFoundError(
        f"no recipe {str(name)!r}: give the path of a .toml file"
        + (f" (that folder holds {', '.join(beside)})" if beside else "")
        + f" or one of {', '.join(shipped)}{nearest(path.name.removesuffix('.toml'), shipped)}"
    )


def list_recipes() -> list[Path]:
    """The recipes that ship with the package, sorted by name."""
    here = Path(__file__).resolve()
    # A wheel carries them beside this file; a checkout (and an editable install of it) keeps them at its root.
    folder = next((f for f in (here.parent / "recipes", here.parents[2] / "recipes") if f.is_dir()), None)
    return sorted(folder.glob("*.toml")) if folder else []


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a TOML recipe, found as `find_recipe` does; `overrides` maps dotted keys ("optim.lr") to values that replace
    the file's.

    Raises FileNotFoundError, ValueError (not TOML, unknown key, wrong type).
    """
    path = find_recipe(path)
    try:
        values = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for dotted, value in (overrides or {}).items():
        section = values
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    for section in values.values():
        if isinstance(section, dict):
            section |= {key: expand_path(text) for key, text in section.items() if isinstance(text, str)}
    return recipe_from_dict(values)


def read_text(path: Path) -> str:
    """A text file of a user's: UTF-8, with or without a byte order mark. Raises ValueError with its name for anything else."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} in line {line}); save it as UTF-8 in your editor, "
            f'or convert it: iconv -f latin1 -t utf-8 (utf-16 in place of latin1 for Windows\' "Unicode")'
        ) from None


def expand_path(text: str) -> str:
    """A path as a shell would read it: a leading ~ or $HOME is the home folder.

    What does not begin like that, and what lies there under its very name, stays as it is. Raises ValueError where no
    home folder is known.
    """
    if not re.match(r"(~|\$HOME|\$\{HOME\})(/|$)", text) or os.path.lexists(text):
        return text
    try:
        home = Path.home()
    except RuntimeError:
        raise ValueError(f"{text}: no home folder is known here. Set HOME, or give the path from / on") from None
    return str(home / text.partition("/")[2])


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out; None (a default that has no TOML form) is left out."""
    lines: list[str] = []

    def table(values: Mapping[str, Any], prefix: str) -> None:
        plain = {k: v for k, v in values.items() if v is not None and not isinstance(v, dict)}
        nested = {k: v for k, v in values.items() if isinstance(v, dict) and v}
        if prefix and plain:
            lines.extend(["", f"[{prefix}]"])
        # JSON's strings, numbers, booleans and lists are TOML's as well.
        lines.extend(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items())
        for key, value in nested.items():
            table(value, f"{prefix}.{key}" if prefix else key)

    table(recipe.to_dict(), "")
    return "\n".join(lines) + "\n"


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` for an unknown name, or an empty string: for error messages."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"[{where}] is a table of keys, but {values!r} was given")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            name = f"{where}.{key}" if where else key
            raise ValueError(f"unknown recipe key {name!r}{nearest(key, hints) or '.'} Known here: {', '.join(hints)}")
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}" if where else k) for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise ValueError(
            f"{where} is {value!r}; allowed: {', '.join(map(repr, args))}{nearest(str(value), map(str, args))}"
        )
    elif origin is tuple and args[1:] == (...,) and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], item, where) for item in value)
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        return tuple(_convert(a, v, where) for a, v in zip(args, value))
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif hint is type(None) and value is None:
        return None
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{where} is {value!r} ({type(value).__name__}); it takes {wanted}")
