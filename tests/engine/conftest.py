"""A run that takes a second: a VOLO of 26,000 parameters on the handwritten digits, one thread, 26 steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from volo.config import Recipe, recipe_from_dict

RUN_SCRIPT = Path(__file__).with_name("run_recipe.py")


def tiny(overrides: dict[str, Any] | None = None) -> Recipe:
    values: dict[str, Any] = {
        "model": {
            "name": "volo_nano",
            "drop_path_rate": 0.1,
            "options": {"depths": [1, 1], "embed_dims": [16, 32], "num_heads": [1, 2], "stem_dim": 8, "patch_size": 4},
        },
        "data": {"kind": "digits", "img_size": 16, "num_workers": 0},
        "augment": {"crop": "pad", "pad": 2, "hflip": 0.0, "erase_prob": 0.2, "mix_token": 1.0},
        "optim": {"lr": 3e-3, "ema_decay": 0.99, "clip_grad": 1.0},
        "schedule": {"epochs": 2, "warmup_epochs": 0.5, "cooldown_epochs": 0.2},
        "train": {"batch_size": 128, "threads": 1, "tensorboard": False, "device": "cpu"},
    }
    for dotted, value in (overrides or {}).items():
        section, name = dotted.split(".", 1)
        values.setdefault(section, {})[name] = value
    return recipe_from_dict(values)


@pytest.fixture(scope="session", name="tiny")
def _tiny() -> Callable[..., Recipe]:
    """tiny({"optim.lr": 1.0}) -> the recipe with that changed."""
    return tiny


@pytest.fixture
def start_run() -> Callable[..., subprocess.Popen[str]]:
    """start_run(recipe, out, "--resume", processes=2, RANK_TO_KILL=1) -> the process (torchrun's for several processes)."""
    children: list[subprocess.Popen[str]] = []

    def start(recipe: Recipe, out: Path, *flags: str, processes: int = 1, **env: Any) -> subprocess.Popen[str]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        child = subprocess.Popen(
            [*launcher, str(RUN_SCRIPT), json.dumps(recipe.to_dict()), str(out), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in env.items()},
            start_new_session=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()
