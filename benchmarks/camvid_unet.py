"""What a plain U-Net reaches on CamVid in the budget of a recipe of ours: same images, augmentation, loss, training loop,
averaging of weights and scores; only the network and its learning rate differ.

pip install segmentation_models_pytorch
python benchmarks/camvid_unet.py camvid --minutes 60 --out runs/camvid_unet

The number of steps follows from the speed that is measured first. The result, scored on the test images once with the
last and once with the best weights on the validation images, is printed as JSON and kept in OUT/test.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.config import ModelConfig, Recipe, load_recipe
from volo.data.files import write_atomically
from volo.data.loader import MaskEvalLoader
from volo.data.masks import open_split
from volo.data.transforms import PixelPipeline
from volo.distributed import World
from volo.inference.evaluate import AMP_DTYPES
from volo.inference.segment_evaluate import evaluate_segmentation
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.optim import create_optimizer
from volo.training.report import NullReporter
from volo.training.workloads.segmentation import Segmentation

STRIDE = 32
"""The U-Net takes sizes that are multiples of this: others are padded at the right and bottom."""


class UNet(nn.Module):
    """images [B, 3, H, W] -> logits [B, num_classes, H, W]; random weights."""

    def __init__(self, encoder: str, num_classes: int) -> None:
        super().__init__()
        self.net = smp.Unet(encoder, encoder_weights=None, in_channels=3, classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        return self.net(F.pad(images, (0, -W % STRIDE, 0, -H % STRIDE)))[..., :H, :W]


class UNetSegmentation(Segmentation):
    """The workload of task "segment" with a U-Net; `model.name` of the recipe is "unet:ENCODER"."""

    def create_model(self) -> nn.Module:
        torch.manual_seed(self.recipe.train.seed)
        return UNet(self.recipe.model.name.removeprefix("unet:"), len(self.classes))

    def restore_model(self, config: dict[str, Any]) -> nn.Module:
        return UNet(**config)

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        return {"encoder": self.recipe.model.name.removeprefix("unet:"), "num_classes": len(self.classes)}


def seconds_of(workload: UNetSegmentation, recipe: Recipe) -> tuple[float, float]:
    """(of a training step, of an evaluation), measured here."""
    device = workload.world.device
    task = workload.create_task(workload.create_model()).to(device).train()
    if recipe.train.channels_last:
        task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer(task.get_submodule("model"), recipe.optim, recipe.peak_lr)
    times = []
    amp = recipe.train.amp
    start = time.perf_counter()
    for batch in workload.batches(0, 12):
        prepared = workload.prepare(batch)
        if recipe.train.channels_last:
            prepared["image"] = prepared["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            loss = task(prepared)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    workload.evaluate(task.get_submodule("model"), lambda done: None)
    return sorted(times)[len(times) // 2], time.perf_counter() - start


def test_score(out: Path, name: str, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Figures on the test images with the weights of a checkpoint."""
    checkpoint = load_checkpoint(out / name)
    model = UNet(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    pictures, _ = open_split(recipe.data, recipe.segment, "test")
    loader = MaskEvalLoader(pictures, recipe.data, recipe.segment, batch_size=1)
    pixels = PixelPipeline(recipe.data).to(device)
    figures = evaluate_segmentation(
        model.to(device), loader, pixels, num_classes=len(checkpoint["classes"]), device=device
    )
    per_class = dict(zip(checkpoint["classes"], figures["per_class_iou"]))
    kept = ("miou", "pixel_accuracy", "mean_class_accuracy", "boundary_iou")
    return {"step": checkpoint["step"], **{key: figures[key] for key in kept}, "per_class_iou": per_class}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the CamVid folder")
    parser.add_argument("--recipe", default="camvid_cpu", help="whose data, augmentation and loss are taken")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--encoder", default="mobilenet_v2", help="of segmentation_models_pytorch")
    parser.add_argument("--optimizer", default="adamw", help="one of timm's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--evaluations", type=int, default=11, help="on the validation images, in all")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid_unet"))
    args = parser.parse_args()

    recipe = load_recipe(args.recipe)
    recipe = dataclasses.replace(
        recipe,
        model=ModelConfig(name=f"unet:{args.encoder}"),
        data=dataclasses.replace(recipe.data, path=args.data),
        optim=dataclasses.replace(recipe.optim, name=args.optimizer, lr=args.lr),
        train=dataclasses.replace(recipe.train, threads=args.threads),
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a_step, an_evaluation = seconds_of(UNetSegmentation(recipe, World(0, 1, device)), recipe)
    steps = int((60 * args.minutes - args.evaluations * an_evaluation) / a_step)
    print(f"{a_step:.3f} s a step, {an_evaluation:.1f} s an evaluation: {steps:,} steps in {args.minutes:g} minutes")
    if steps < 10:
        raise SystemExit("the budget is too small")
    schedule = dataclasses.replace(recipe.schedule, steps=steps, warmup_steps=max(1, steps // 25))
    train_config = dataclasses.replace(recipe.train, eval_steps=max(1, -(-steps // args.evaluations)))
    recipe = dataclasses.replace(recipe, schedule=schedule, train=train_config)
    result = train(recipe, args.out, overwrite=True, reporter=NullReporter(), workload=UNetSegmentation)
    summary = {
        "model": recipe.model.name,
        "parameters": sum(p.numel() for p in UNet(args.encoder, len(result.classes)).parameters()),
        "minutes": round(result.seconds / 60, 1),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": str(torch.__version__), "segmentation_models_pytorch": smp.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "last": test_score(args.out, "last.pt", recipe, device),
        "best": test_score(args.out, "best.pt", recipe, device),
    }
    text = json.dumps(summary, indent=1)
    write_atomically(args.out / "test.json", lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()
