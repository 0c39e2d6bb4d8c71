"""`volo info`: what is here, and what it can do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from volo import __version__
from volo.cli.console import results
from volo.cli.main import WAITING
from volo.cli.options import run
from volo.config import list_recipes


@dataclass(frozen=True)
class InfoOptions:
    models: bool = False
    """List models, published weights and recipes as well."""
    json: bool = False
    """Print one JSON object."""


def info(options: InfoOptions) -> int:
    """Versions, devices, which backend computes outlook attention here and why not another; models and weights.

    Examples:
      volo info
      volo info --models
      volo info --json
    """
    facts = _facts(options.models)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show_info(results(), facts)
    return 0


def _facts(with_models: bool) -> dict[str, Any]:
    import torch

    from volo.models.factory import create_model, list_segmenters
    from volo.models.hub import OWN, PRETRAINED, find
    from volo.models.volo import VARIANTS
    from volo.ops.outlook_attention import list_backends

    versions: dict[str, str | None] = {"volo": __version__, "python": platform.python_version()}
    for name in (
        "torch",
        "torchvision",
        "timm",
        "triton",
        "numpy",
        "pillow",
        "safetensors",
        "tyro",
        "rich",
        "matplotlib",
        "tensorboard",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        )
    waits = {name: os.environ[name] for name in WAITING if name in os.environ}
    # Stage 1 of D1 at 224 px, what most calls look like.
    engines = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        value = torch.zeros(1, 28, 28, 6, 32, device=device)
        logits = torch.zeros(1, 14, 14, 6, 9, 9, device=device)
        engines[device] = {engine.name: engine.why_not(value, logits, 3, 2, 1) for engine in list_backends()}
    facts: dict[str, Any] = {
        "versions": versions,
        "devices": devices,
        "openmp": waits,
        "outlook_attention": engines,
        "cache": _cache(),
    }
    if with_models:
        facts["models"] = {}
        for name in VARIANTS:
            with torch.device("meta"):
                model = create_model(name)
            facts["models"][name] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "img_size": model.config.img_size[0],
                "depths": model.config.depths,
                "embed_dims": model.config.embed_dims,
            }
        facts["pretrained"] = {
            tag: {
                "top1": w.top1,
                "real": w.real,
                "v2": w.v2,
                "crop_original": w.crop_pct_original,
                "crop_timm": w.crop_pct_timm,
                "cached": find(tag) is not None,
            }
            for tag, w in PRETRAINED.items()
        }
        facts["own"] = {name: find(name) is not None for name in OWN}
        facts["segmentation"] = list_segmenters()
        facts["recipes"] = {path.stem: _title(path) for path in list_recipes()}
    return facts


def _cache() -> str:
    from volo.data.files import cache_folder

    try:
        return str(cache_folder())
    except ValueError as error:
        return f"no folder: {error}"


def _title(recipe: Path) -> str:
    """What the first line of a recipe says it is."""
    with recipe.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def show_info(console: Console, facts: dict[str, Any]) -> None:
    """What `volo info` found out, as tables."""

    def table(title: str, *columns: str) -> Table:
        console.print(Text(title, style="bold"))
        made = Table(header_style="dim", box=None, show_header=bool(columns))
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i and columns[i] not in ("", "what", "depths") else "left")
        return made

    def show(made: Table) -> None:
        console.print(made, highlight=False)
        console.print()

    versions = table("versions")
    for name, version in facts["versions"].items():
        versions.add_row(name, version or Text("not installed", style="dim"))
    show(versions)
    devices = table("devices")
    for name, what in facts["devices"].items():
        devices.add_row(name, what)
    waits = ", ".join(f"{name}={value}" for name, value in facts["openmp"].items())
    devices.add_row("openmp", f"threads wait by {waits or 'spinning, as by default'}")
    show(devices)
    for device, engines in facts["outlook_attention"].items():
        made = table(f"backends of outlook attention on {device}, the first that supports the call is taken")
        for name, why_not in engines.items():
            made.add_row(name, Text(f"no: {why_not}", style="yellow") if why_not else Text("yes", style="green"))
        show(made)
    if "models" in facts:
        made = table("models", "", "parameters", "pixels", "depths", "widths")
        for name, m in facts["models"].items():
            depths, widths = (", ".join(map(str, m[key])) for key in ("depths", "embed_dims"))
            made.add_row(name, f"{m['parameters']:,}", str(m["img_size"]), depths, widths)
        show(made)
        made = table(
            "published weights (ImageNet-1k, %)", "", "top-1", "ReaL", "V2", "crop original", "crop timm", "here"
        )
        for tag, w in facts["pretrained"].items():
            figures = (f"{w[key]:.2f}" for key in ("top1", "real", "v2", "crop_original", "crop_timm"))
            made.add_row(tag, *figures, "yes" if w["cached"] else "")
        show(made)
        console.print(Text("weights of our own (docs/models)", style="bold"))
        own = (f"{name} ({'here' if here else 'not on this machine'})" for name, here in facts["own"].items())
        console.print(", ".join(own) + "\n", highlight=False)
        console.print(Text("segmentation models", style="bold"))
        console.print(", ".join(facts["segmentation"]) + "\n", highlight=False)
        made = table("recipes", "", "what")
        for name, what in facts["recipes"].items():
            made.add_row(name, what)
        show(made)
    console.print(f"downloads are kept in {facts['cache']}", soft_wrap=True, highlight=False)


main = partial(run, info)
