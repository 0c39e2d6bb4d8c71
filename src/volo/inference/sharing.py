"""Models on the Hugging Face hub: config.json and model.safetensors, with a model card, through its own mixin.

config.json is a checkpoint of `volo train` without its tensors, so that `load` reads both alike. Paths of the machine
that the model was trained on, and what of the recipe has no bearing on its use, stay at home.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from volo import __version__
from volo.config import Recipe
from volo.inference.model_source import LoadedModel, load
from volo.models.checkpoint import FORMAT, model_config_dict
from volo.models.hub import CONFIG, HUB_PREFIX, WEIGHTS

CARD = """---
{{ card_data }}
---

# {{ name }}

{{ what }} with {{ num_classes }} classes ({{ classes }}), trained on images of {{ size }} pixels.

```python
import volo

model = volo.load("{{ source }}")
{{ use }}
```

{% if figures %}Figures of its last evaluation while it was trained: {{ figures }}.

{% endif %}VOLO: Vision Outlooker for Visual Recognition, [arXiv 2106.13112](https://arxiv.org/abs/2106.13112).
"""


def push_to_hub(model: LoadedModel[Any] | str | Path, repository: str, **options: Any) -> str:
    """Upload a model as a repository of the hub ("user/name"), which is made if it is not there; returns its address.

    Args:
        model: as `volo.load` gives it, or what that takes.
        **options: of `huggingface_hub.ModelHubMixin.push_to_hub`: private, token, commit_message, branch, create_pr.

    Raises ValueError for a model that is not VOLO's, and what `huggingface_hub` raises.
    """
    shared = _mixin()[0](_own(model))
    card = _card(shared.loaded, HUB_PREFIX + repository)
    return shared.push_to_hub(repository, model_card_kwargs=card, **options)


def save_pretrained(model: LoadedModel[Any] | str | Path, folder: str | Path) -> Path:
    """Write what `push_to_hub` uploads into a folder, which `volo.load` takes as well. Raises ValueError if it is not empty."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    shared = _mixin()[0](_own(model))
    shared.save_pretrained(folder, model_card_kwargs=_card(shared.loaded, str(folder)))
    return folder


def from_pretrained(source: str | Path, *, revision: str | None = None, **options: Any) -> LoadedModel[Any]:
    """`volo.load` of a repository of the hub ("user/name"), or of a folder of `save_pretrained`; `options` are those of `load`."""
    return _mixin()[1].from_pretrained(source, revision=revision, **options).loaded


@cache
def _mixin() -> tuple[Any, Any]:
    """(what makes a shared model of a loaded one, its class)."""
    # The library is imported here: whoever shares nothing needs none of it.
    from huggingface_hub import ModelHubMixin

    class SharedModel(
        ModelHubMixin,
        library_name="volo",
        tags=["volo", "vision-outlooker"],
        model_card_template=CARD,
        paper_url="https://arxiv.org/abs/2106.13112",
    ):
        loaded: LoadedModel[Any]  # no argument of __init__, all of which the mixin copies

        def _save_pretrained(self, save_directory: Path) -> None:
            from safetensors.torch import save_file

            weights = self.loaded.model.state_dict()
            save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, save_directory / WEIGHTS)
            config = json.dumps(described(self.loaded), indent=1, ensure_ascii=False)
            (save_directory / CONFIG).write_text(config, encoding="utf-8")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, revision: str | None = None, **options: Any) -> SharedModel:
            known = {"task", "img_size", "crop", "device"}
            options = {name: value for name, value in options.items() if name in known}
            is_folder = Path(model_id).is_dir()
            source = model_id if is_folder else f"{HUB_PREFIX}{model_id}" + (f"@{revision}" if revision else "")
            return share(load(source, **options))

        def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
            card: Any = super().generate_model_card(*args, **kwargs)
            is_segmenter = self.loaded.task == "segment"
            card.data.pipeline_tag = "image-segmentation" if is_segmenter else "image-classification"
            return card

    def share(loaded: LoadedModel[Any]) -> SharedModel:
        shared = SharedModel()
        shared.loaded = loaded
        return shared

    return share, SharedModel


def _own(model: LoadedModel[Any] | str | Path) -> LoadedModel[Any]:
    loaded = model if isinstance(model, LoadedModel) else load(model)
    if not isinstance(loaded.model, nn.Module) or not hasattr(loaded.model, "config"):
        raise ValueError(f"{loaded.origin} is a model of timm; share it by timm.models.push_to_hf_hub")
    return loaded


def described(loaded: LoadedModel[Any]) -> dict[str, Any]:
    """A checkpoint without its tensors, as JSON takes it."""
    data = dataclasses.replace(loaded.preprocessing, path="", kind="auto")
    recipe = Recipe(task=loaded.recipe.task if loaded.recipe else "classify", data=data, segment=loaded.segment)
    return {
        "format": FORMAT,
        "volo_version": __version__,
        "torch_version": str(torch.__version__),
        "model_config": model_config_dict(loaded.model),
        "classes": list(loaded.classes),
        "wnids": list(loaded.wnids),
        "recipe": {section: recipe.to_dict()[section] for section in ("task", "data", "segment")},
        "metrics": {k: v for k, v in loaded.metrics.items() if isinstance(v, int | float | str)},
        "step": loaded.step,
        "extras": loaded.extras,
    }


def _card(loaded: LoadedModel[Any], source: str) -> dict[str, str]:
    config = loaded.model.config
    is_segmenter = loaded.task == "segment"
    figures = {"top1": "top-1", "miou": "mean IoU", "map": "mAP", "r2": "R²"}
    found = [f"{label} {100 * loaded.metrics[key]:.2f} %" for key, label in figures.items() if key in loaded.metrics]
    some = ", ".join(loaded.classes[:8]) + (", ..." if len(loaded.classes) > 8 else "")
    return {
        "name": source.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2],
        "what": f"A VOLO {'for semantic segmentation' if is_segmenter else 'classifier'}, depths "
        f"{(config.backbone if is_segmenter else config).depths},",
        "num_classes": str(len(loaded.classes)),
        "classes": some,
        "size": str(loaded.preprocessing.img_size),
        "source": source,
        "use": f"volo.evaluate(model, data)  # or: volo segment {source} images/"
        if is_segmenter
        else 'predictions = list(volo.predict(model, "images/"))',
        "figures": ", ".join(found),
    }
