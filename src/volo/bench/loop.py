"""What the training loop costs over a bare loop: data, augmentation, logs and checkpoints against ready tensors."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volo.bench.timing import setting
from volo.config import AugmentConfig, DataConfig, OptimConfig, Recipe, ScheduleConfig, TrainConfig
from volo.tasks.classify import ClassifyTask
from volo.training.loop import train
from volo.training.optim import create_optimizer
from volo.training.report import NullReporter, StepReport
from volo.training.settings import keep_freed_memory
from volo.training.workloads.classification import build_model


def bench_loop(
    model: str = "volo_nano",
    img_size: int = 32,
    batch_size: int = 256,
    rounds: int = 5,
    steps: int = 12,
    device: str = "auto",
) -> dict[str, Any]:
    """Images per second of `volo train`, data included, over those of a bare loop over one ready batch.

    Both loops do the same forward, backward and optimizer step in one process, in turns; of each turn the median step
    counts, without the first two. Images are random, in memory, cropped, flipped and erased as for CIFAR.

    Returns a dict with `ratio` (the median over turns), `ratios` and a row for each loop.
    """
    recipe = Recipe(
        model=dataclasses.replace(Recipe().model, name=model, drop_path_rate=0.0),
        data=DataConfig(kind="npz", img_size=img_size),
        augment=AugmentConfig(crop="pad", erase_prob=0.25, erase_mode="const"),
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(epochs=1, warmup_epochs=0, cooldown_epochs=0),
        train=TrainConfig(batch_size=batch_size, device=device, channels_last=True, tensorboard=False, eval_every=0),
    )
    keep_freed_memory()  # as `volo train` does
    loop_rates, bare_rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pictures.npz"
        generator = np.random.default_rng(0)
        count = batch_size * steps
        np.savez(
            data,
            images=generator.integers(0, 256, (count + 20, img_size, img_size, 3), dtype=np.uint8),
            labels=np.arange(count + 20, dtype=np.int64) % 10,
        )
        recipe = dataclasses.replace(
            recipe, data=dataclasses.replace(recipe.data, path=str(data), val_fraction=20 / (count + 20))
        )
        for turn in range(rounds):
            clock = _StepClock(batch_size)
            train(recipe, Path(folder) / f"run{turn}", reporter=clock)
            loop_rates.append(batch_size / statistics.median(clock.seconds[2:]))
            bare_rates.append(batch_size / statistics.median(_bare_steps(recipe, steps)[2:]))
    ratios = [loop / bare for loop, bare in zip(loop_rates, bare_rates)]
    rows = [
        {"candidate": what, "images_per_second": statistics.median(rates), "rates": rates}
        for what, rates in (("volo train", loop_rates), ("bare loop", bare_rates))
    ]
    return {
        "what": "training loop",
        "model": model,
        "batch_size": batch_size,
        "img_size": img_size,
        "rounds": rounds,
        **setting(torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")),
        "rows": rows,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


class _StepClock(NullReporter):
    """Seconds from one finished step to the next."""

    def __init__(self, batch_size: int) -> None:
        self.seconds: list[float] = []
        self._batch_size = batch_size

    def on_step(self, report: StepReport) -> None:
        # As the loop itself times them: on a GPU reports come in bursts.
        self.seconds.append(self._batch_size / report.images_per_second)


def _bare_steps(recipe: Recipe, steps: int) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.train.device != "cpu" else "cpu")
    model = build_model(recipe, 10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = ClassifyTask(model, recipe.loss, recipe.augment).train()
    optimizer = create_optimizer(model, recipe.optim, recipe.peak_lr)
    size = model.config.img_size
    images = torch.randn(recipe.train.batch_size, 3, *size, device=device)
    batch = {
        "image": images.contiguous(memory_format=torch.channels_last),
        "target": torch.arange(recipe.train.batch_size, device=device) % 10,
    }
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        task(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds
