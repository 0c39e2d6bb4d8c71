"""Train the recipe given as JSON, as a process of its own that tests can kill: run_recipe.py JSON OUT [--resume].

A list of recipes is trained one after the other, in OUT/0, OUT/1, ...; with --resume each goes on from what lies there.

OUT_OF_RANK_1=FOLDER gives that process another folder, as on a machine that does not see the first one's.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time

from volo.config import recipe_from_dict
from volo.distributed import join_world
from volo.training.pipeline import train
from volo.training.report import NullReporter, StepReport


class SlowReporter(NullReporter):
    """Makes one step last a while."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            time.sleep(self.seconds)


def die_at_step(step: int) -> None:
    """This process gets killed in its forward pass of `step`, as by a machine that fails."""
    from volo.tasks.classify import ClassifyTask

    forward, calls = ClassifyTask.forward, 0

    def dying(self, batch):
        nonlocal calls
        calls += "target" in batch
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, batch)

    ClassifyTask.forward = dying


def trouble_with_the_index(seconds: float, is_disk_full: bool) -> None:
    """The first process is late with the index of its label maps, or cannot write it."""
    from volo.annotation import store

    write_index = store.write_index

    def write(*arguments):
        time.sleep(seconds)
        if is_disk_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_index(*arguments)

    store.write_index = write


def leave_batch_norm_out() -> None:
    """Segmentation models without it: its statistics are those of a micro batch, and on a CPU nothing synchronises them."""
    from torch import nn

    from volo.training.workloads.segmentation import Segmentation

    create_model = Segmentation.create_model

    def without(self):
        model = create_model(self)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        return model

    Segmentation.create_model = without


PAUSES = {"--slow": (3, 60.0), "--wait": (5, 2.0), "--wait-late": (15, 5.0)}

if __name__ == "__main__":
    if os.environ.get("RANK_TO_KILL") == os.environ.get("RANK", "none"):
        die_at_step(20)
    if "--late-index" in sys.argv or "--full-disk" in sys.argv:
        trouble_with_the_index(5.0, is_disk_full="--full-disk" in sys.argv)
    if "--no-batch-norm" in sys.argv:
        leave_batch_norm_out()
    recipes = json.loads(sys.argv[1])
    if isinstance(recipes, list):
        with join_world("cpu"):
            for number, recipe in enumerate(recipes):
                train(recipe_from_dict(recipe), f"{sys.argv[2]}/{number}", resume="--resume" in sys.argv)
        sys.exit()
    result = train(
        recipe_from_dict(recipes),
        os.environ.get(f"OUT_OF_RANK_{os.environ.get('RANK', 0)}", sys.argv[2]),
        resume="--resume" in sys.argv,
        reporter=next((SlowReporter(*pause) for flag, pause in PAUSES.items() if flag in sys.argv), None),
    )
    sys.stdout.write(f"{result.status} {result.step}\n")  # in one piece: another process writes there as well
    sys.stdout.flush()
    sys.exit(128 + result.signal if result.signal else 0)
