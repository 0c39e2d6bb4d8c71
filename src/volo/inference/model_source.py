"""One way from a string to a model: what users name on the command line and in Python, read once.

| string | what it is |
|---|---|
| a folder | a run of `volo train` (its best.pt, else its last.pt), or a model saved for the hub |
| a file | a checkpoint of `volo train`, or weights of the original, of timm, of Lightning: .pt, .pth.tar, .safetensors |
| a file | what `volo export` wrote: .onnx, .xml (OpenVINO), .pt2 (torch.export), .pte (ExecuTorch), .tflite (LiteRT); it runs on the CPU |
| volo_nano, volo_tiny | weights of our own: those of volo_nano come with the package |
| volo_d1.224, volo_d1 | published weights; without a size those at 224 |
| hf-hub:user/name | a repository of the Hugging Face hub, with @revision if need be |
| resnet50.a1_in1k | a classifier of timm, where one is asked for (annotators) |
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from volo.config import DataConfig, Recipe, SegmentConfig, Size, load_recipe, nearest, recipe_from_dict
from volo.data.classes import printable
from volo.data.imagenet import imagenet_classes
from volo.data.mask_values import Colour, default_colours
from volo.data.targets import TableTargets
from volo.data.transforms import height_width
from volo.inference.exported import is_exported, open_exported
from volo.models.checkpoint import check_format, find_checkpoint, is_checkpoint, model_of_checkpoint
from volo.models.factory import create_model, model_of_shapes
from volo.models.hub import CONFIG, HUB_PREFIX, OWN, PRETRAINED, WEIGHTS, fetch, fetch_from_hub, list_pretrained
from volo.models.loading import read_file, read_state_dict, state_dict_in

Task = Literal["classify", "segment", "table"]
Crop = float | Literal["original", "timm"]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoadedModel(Generic[Model]):
    """A model with all it takes to use it."""

    model: Model
    """In eval mode: `VOLO`, `Segmenter`, or a classifier of timm."""
    task: Task
    classes: tuple[str, ...]
    """Names, in the order of the logits; empty for a classifier of timm whose classes are not known."""
    preprocessing: DataConfig
    """Size, crop and normalisation; `path` and `kind` are those of its own training run."""
    origin: str
    """For people: the file or tag, and the step of the training."""
    wnids: tuple[str, ...] = ()
    """WordNet ids of the classes where they are ImageNet's."""
    tag: str = ""
    """That of the published weights of this model and size, whose settings it takes over."""
    recipe: Recipe | None = None
    """How it was trained, if that is known."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of the last evaluation before the checkpoint."""
    step: int = 0
    extras: dict[str, Any] = field(default_factory=dict)
    """What its training left besides (`Workload.extras`)."""

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))  # exported files have none

    @property
    def segment(self) -> SegmentConfig:
        return self.recipe.segment if self.recipe else SegmentConfig()

    @property
    def targets(self) -> TableTargets:
        """What a model of task "table" says of an image."""
        return TableTargets.from_list(self.extras["targets"])

    @property
    def number_loss(self) -> str:
        """By which loss a model of task "table" learned its numbers (`TableConfig.number_loss`)."""
        return self.recipe.table.number_loss if self.recipe else self.extras.get("number_loss", "huber")

    @property
    def colours(self) -> tuple[Colour, ...]:
        """Of the classes, for a segmentation model."""
        return tuple(
            (int(r), int(g), int(b)) for r, g, b in self.extras.get("colours") or default_colours(self.classes)
        )

    @property
    def object_value(self) -> int:
        """Value of the object in masks of two classes, as this model learned it; 1 where nothing says another."""
        return max(1, int(self.extras.get("object_value", 1)))


def load(
    source: str | Path,
    *,
    task: Task | None = None,
    img_size: Size | None = None,
    crop: Crop | None = None,
    device: torch.device | str = "cpu",
    use_ema: bool = True,
    timm: bool = False,
    weights: str | Path | None = None,
    trust: bool = False,
) -> LoadedModel[Any]:
    """The model that `source` names, in eval mode, with its classes and how it wants its images.

    Args:
        source: a run folder, a checkpoint, a weight file, published weights, "hf-hub:user/name", or a model of timm: see
            the table at the head of this module. What lies at that path comes first. A weight file that does not say
            what it is of is known by its names and shapes; its classes are ImageNet's if there are 1000, else numbers.
        task: "classify", "segment" or "table", if only such a model will do.
        img_size: another size than the one it was made for; for classifiers.
        crop: another crop_pct, or the preset of the original code or of timm (for models and sizes that are published;
            timm's is the default); for classifiers.
        device: "meta" for the architecture alone: no weights are read or downloaded.
        use_ema: averaged weights where a checkpoint has them.
        timm: names of timm's models mean these.
        weights: for a model of timm, a weight file in place of its published weights.
        trust: open packages of AOTInductor too: they hold native code, which runs when they are loaded.

    Raises FileNotFoundError where nothing is there, ValueError for what is no model or not of that task, and for crop
    presets of models that have none; DownloadError.
    """
    loaded = _find(source, task, img_size, device, use_ema, timm, weights, trust)
    if (shown := tuple(map(printable, loaded.classes))) != loaded.classes:  # a file of somebody else's
        loaded = dataclasses.replace(loaded, classes=shown)
    if task is not None and loaded.task != task:
        what = {
            "segment": "a segmentation model, which names pixels: use `volo segment` or `volo evaluate`",
            "classify": "a classifier, which names whole images: use `volo predict` or `volo evaluate`",
            "table": "a model of task 'table' (several labels, numbers, several outputs): use `volo predict` or `volo evaluate`",
        }
        raise ValueError(f"{source} is {what[loaded.task]}")
    if loaded.task == "segment":
        if img_size is not None or crop is not None:
            raise ValueError(f"img_size and crop are for classifiers; {source} is a segmentation model")
        return loaded
    data = loaded.preprocessing
    if crop in ("original", "timm"):
        if loaded.tag not in PRETRAINED:
            raise ValueError(
                f"crop presets belong to published weights, which {source} does not have; its crop_pct is {data.crop_pct}. "
                "Leave --crop out, or give a number"
            )
        preset = PRETRAINED[loaded.tag]
        share = preset.crop_pct_original if crop == "original" else preset.crop_pct_timm
        data = dataclasses.replace(data, crop_pct=share)
    elif crop is not None:
        if isinstance(crop, str) or not 0 < crop <= 4:
            raise ValueError(
                f"crop is img_size / size before the crop, above 0 and at most 4, or 'original' or 'timm'; given: {crop!r}"
            )
        data = dataclasses.replace(data, crop_pct=float(crop))
    if img_size is not None:
        data = dataclasses.replace(data, img_size=img_size)
    return dataclasses.replace(loaded, preprocessing=data)


def refuse_published(source: str | Path, why: str) -> None:
    """Raises ValueError, and says `why`, if `source` names published weights, all of which are classifiers: before they are
    downloaded."""
    if not Path(source).exists() and {str(source), f"{source}.224"} & PRETRAINED.keys():
        raise ValueError(f"{why}, and {source} is a classifier")


def _find(
    source: str | Path,
    task: Task | None,
    img_size: Size | None,
    device: torch.device | str,
    use_ema: bool,
    timm: bool,
    weights: str | Path | None,
    trust: bool,
) -> LoadedModel[Any]:
    name, path = str(source), Path(source)
    tag = name if name in PRETRAINED else f"{name}.224"
    is_own = not path.exists() and name in OWN
    is_ours = path.exists() or tag in PRETRAINED or is_own
    if weights is not None and is_ours:
        raise ValueError(f"{name} has weights of its own; a weight file beside it is for models of timm")
    if path.is_dir() and (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return _from_config(path / CONFIG, path / WEIGHTS, name, device, timm)
    if is_exported(path):
        return _from_exported(path, trust)
    if path.exists():
        path = find_checkpoint(path)
        return _with_place_of_data(
            _from_content(read_file(path), str(path), device, use_ema), path.with_name("recipe.toml")
        )
    if is_own:
        return dataclasses.replace(
            _from_content(read_file(fetch(name)), f"the weights of {name}", device, use_ema), tag=name
        )
    if name.startswith(HUB_PREFIX):
        repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
        files = [fetch_from_hub(repository, file, revision or None) for file in (CONFIG, WEIGHTS)]
        return _from_config(files[0], files[1], name, device, timm)
    if tag in PRETRAINED:
        published = PRETRAINED[tag]
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                model = create_model(published.variant, img_size=published.img_size)
        else:
            model = create_model(published.variant, pretrained=tag).to(device)
        return _with_published_settings(model, tag, f"published weights {tag}")
    if timm and task != "segment":
        return _from_timm(name, weights, img_size, device)
    beside = [p.name for p in path.parent.iterdir()] if path.parent != Path() and path.parent.is_dir() else []
    close = nearest(name, list_pretrained()) or nearest(path.name, beside)
    raise FileNotFoundError(
        f"no model {name!r}{close} (give a run folder or checkpoint of `volo train`, a weight file, {HUB_PREFIX}user/name, "
        f"or pretrained weights: {', '.join(list_pretrained())})"
    )


def _from_exported(path: Path, trust: bool) -> LoadedModel[Any]:
    """A file of `volo export`, which says everything itself."""
    model = open_exported(path, trust=trust)
    described = model.description
    if len(model.outputs) > 1 or described.get("in_chans", 3) != 3:
        raise ValueError(
            f"{path} takes {described.get('in_chans', 3)} channels and gives {', '.join(model.outputs)}: that is no classifier of "
            "images. Run it in its own runtime, or by `volo.inference.exported.open_exported`"
        )
    how: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described["preprocessing"].items()}
    return LoadedModel(
        model=model,
        task=described["task"],
        classes=tuple(described["classes"]),
        preprocessing=DataConfig(**how),
        origin=f"{path}, exported from {described['origin']}",
        wnids=tuple(described["wnids"]),
        extras={
            key: described[key]
            for key in ("colours", "object_value", "targets", "number_loss")
            if described.get(key) not in (None, [])
        },
    )


def _from_content(content: Any, origin: str, device: torch.device | str, use_ema: bool) -> LoadedModel[Any]:
    """From what a file holds: a checkpoint of ours says everything, other weights are known by their shapes."""
    if not is_checkpoint(content):
        name, model = model_of_shapes(state_dict_in(content, origin), origin, device=device)
        if not model.num_classes or model.config.in_chans != 3:
            lacks = (
                "has no heads" if not model.num_classes else f"takes {model.config.in_chans} channels in place of RGB"
            )
            raise ValueError(f"{origin} holds weights of a {name} that {lacks}; it cannot name what is in images")
        height, width = model.config.img_size
        tag = f"{name}.{height}" if height == width and f"{name}.{height}" in PRETRAINED else ""
        return _with_published_settings(model, tag, f"{origin}, weights of {name}")
    check_format(content, origin)
    recipe = recipe_from_dict(content["recipe"])
    return LoadedModel(
        model=model_of_checkpoint(content, origin, use_ema=use_ema, device=device),
        task=_task_of(content),
        classes=tuple(content["classes"]),
        preprocessing=recipe.data,
        origin=f"{origin}, step {content['step']}" if content["step"] else origin,
        wnids=tuple(content.get("wnids", ())),
        recipe=recipe,
        metrics=content["metrics"],
        step=content["step"],
        extras=content.get("extras", {}),
    )


def _task_of(checkpoint: Mapping[str, Any]) -> Task:
    if "backbone" in checkpoint["model_config"]:
        return "segment"
    return "table" if "targets" in checkpoint.get("extras", {}) else "classify"


def _with_place_of_data(loaded: LoadedModel[Any], recipe: Path) -> LoadedModel[Any]:
    """A checkpoint knows where the data of its run lay then; the run's recipe beside it, where it lies now."""
    try:
        now = load_recipe(recipe) if loaded.recipe is not None and recipe.is_file() else None
    except ValueError:  # of another version
        now = None
    if now is None or loaded.recipe is None or (now.task, now.model) != (loaded.recipe.task, loaded.recipe.model):
        return loaded
    data = dataclasses.replace(loaded.preprocessing, path=now.data.path, kind=now.data.kind, root=now.data.root)
    return dataclasses.replace(loaded, preprocessing=data, recipe=dataclasses.replace(loaded.recipe, data=data))


def _from_config(config: Path, weights: Path, origin: str, device: torch.device | str, timm: bool) -> LoadedModel[Any]:
    """From the two files of a model on the hub: ours say everything, those of timm how images are prepared."""
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} of {origin} is not JSON ({error})") from error
    if is_checkpoint(described):
        return _from_content(described | {"model": read_state_dict(weights), "ema": None}, origin, device, False)
    architecture = str(described.get("architecture", "")) if isinstance(described, Mapping) else ""
    if timm and architecture and not architecture.startswith("volo_"):
        return _from_timm(architecture, weights, None, device, origin)
    loaded = _from_content(read_file(weights), origin, device, False)
    its: Any = described.get("pretrained_cfg") if isinstance(described, Mapping) else None
    if not isinstance(its, Mapping):
        return loaded
    data = loaded.preprocessing
    data = dataclasses.replace(
        data,
        crop_pct=float(its.get("crop_pct") or data.crop_pct),
        mean=tuple(its.get("mean") or data.mean),
        std=tuple(its.get("std") or data.std),
    )
    names = its.get("label_names")
    if loaded.wnids or not isinstance(names, list) or len(names) != len(loaded.classes):
        return dataclasses.replace(loaded, preprocessing=data)
    return dataclasses.replace(loaded, preprocessing=data, classes=tuple(map(str, names)))


def _with_published_settings(model: Any, tag: str, origin: str) -> LoadedModel[Any]:
    """Size by the model, crop by the tag if it is a published one, classes by their number."""
    height, width = model.config.img_size
    data = DataConfig(img_size=height if height == width else (height, width), interpolation="bicubic")
    if tag:
        data = dataclasses.replace(data, crop_pct=PRETRAINED[tag].crop_pct_timm)
    wnids, classes = imagenet_classes() if model.num_classes == 1000 else ((), map(str, range(model.num_classes)))
    return LoadedModel(model.eval(), "classify", tuple(classes), data, origin, wnids, tag)


def _from_timm(
    name: str, weights: str | Path | None, img_size: Size | None, device: torch.device | str, origin: str = ""
) -> LoadedModel[Any]:
    """A classifier of timm, as in `timm.list_models()`, with or without a tag; with `weights` their head tells the number
    of classes, and models that are built for one size are built for `img_size`."""
    import timm

    known = timm.list_models(pretrained=False)
    if not timm.is_model(name):
        raise ValueError(
            f"no annotator {name!r}{nearest(name.partition('.')[0], known)} (give a run folder or a checkpoint of `volo train`, "
            f"a pretrained tag such as volo_d1.224, {HUB_PREFIX}user/name, or one of the {len(known)} models of "
            "timm.list_models())"
        )
    config = timm.get_pretrained_cfg(name) or timm.get_pretrained_cfg(name.partition(".")[0])
    native = height_width(tuple(config.input_size[1:]))  # type: ignore[arg-type]
    tested = config.test_input_size or config.input_size
    size = height_width(img_size) if img_size is not None else native if config.fixed_input_size else tuple(tested[1:])
    options: dict[str, Any] = {"img_size": size} if config.fixed_input_size and size != native else {}
    state_dict = read_state_dict(weights) if weights else None
    if state_dict is not None:
        heads = [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())
        found = [state_dict[key] for head in heads if (key := f"{head}.weight") in state_dict]
        if not found:
            raise ValueError(f"{weights} has no classifier {' or '.join(heads)} as {name} has: it holds another model")
        options["num_classes"] = len(found[0])
    is_outline = torch.device(device).type == "meta"
    try:
        with torch.device("meta" if is_outline else "cpu"):
            model = timm.create_model(name, pretrained=not weights and not is_outline, **options)
    except TypeError as error:
        raise ValueError(f"timm cannot build {name} for images of {size[0]} x {size[1]}: {error}") from error
    if state_dict is not None and not is_outline:
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        own = {key: tensor.shape for key, tensor in model.state_dict().items()}
        if convert is not None and own != {key: tensor.shape for key, tensor in state_dict.items()}:
            state_dict = convert(state_dict, model)  # position embeddings of another size, names of the first release
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {name}: {error}") from error
    wnids, classes = imagenet_classes() if model.num_classes == 1000 else ((), ())
    data = DataConfig(
        img_size=size,  # type: ignore[arg-type]
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
    )
    what = origin or (f"{name} with weights of {weights}" if weights else f"timm's {name}")
    return LoadedModel(model.to(device).eval(), "classify", tuple(classes), data, what, wnids)
