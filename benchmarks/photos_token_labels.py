"""Token labels on a folder of photos: do they pay, at equal total time, for who starts from pretrained weights?

    python benchmarks/photos_token_labels.py PHOTOS --work DIR

Two ways to fine-tune volo_nano from its own weights, equally many epochs in all, three seeds each:

    plain    recipe photos: one label an image, CutMix and mixup
    maps     recipe photos_token_labels: a third of the epochs trains the annotator (recipe photos_annotator: MixToken and the
             image's own label on every token), the rest learns from its maps

What counts is the top-1 of the last epoch on the held-out photos. The runs go to --work, where the same command continues an
interrupted comparison; the figures to benchmarks/results/token_labels/photos.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch

import volo
from volo.bench.timing import setting
from volo.config import Recipe, load_recipe
from volo.data.files import write_atomically

RESULT = Path(__file__).parent / "results/token_labels/photos.json"
ANNOTATOR_SHARE = 1 / 3
ARMS = {"plain": "photos", "maps": "photos_token_labels"}


def shortened(recipe: Recipe, epochs: int, data: Path, seed: int) -> Recipe:
    """`recipe` for `epochs` of the photos in `data`, evaluated at the end alone."""
    schedule = dataclasses.replace(recipe.schedule, epochs=epochs, minutes=0.0)
    train = dataclasses.replace(recipe.train, seed=seed, eval_every=epochs)
    return dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, path=str(data)), schedule=schedule, train=train
    )


def run(arm: str, epochs: int, data: Path, seed: int, work: Path) -> dict[str, float]:
    """Train one arm, or read what it gave: top-1 of the last epoch, from 0 to 100, and seconds of training."""
    done = work / f"{arm}_{seed}.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    out, seconds = work / f"{arm}_{seed}", 0.0
    recipe = load_recipe(ARMS[arm])
    if arm == "maps":
        first = round(epochs * ANNOTATOR_SHARE)
        annotator = shortened(load_recipe("photos_annotator"), first, data, seed)
        taught = volo.train(annotator, out.with_name(f"annotator_{seed}"), resume=True)
        seconds += taught.seconds
        settings = dataclasses.replace(recipe.annotator, recipe="", model=str(out.with_name(f"annotator_{seed}")))
        recipe, epochs = dataclasses.replace(recipe, annotator=settings), epochs - first
    result = volo.train(shortened(recipe, epochs, data, seed), out, resume=True)
    if result.status != "completed":
        raise SystemExit(f"stopped by signal {result.signal}; the same command goes on")
    figures = {"top1": 100 * result.metrics["top1"], "seconds": round(seconds + result.seconds, 1)}
    if arm == "maps":
        figures["annotator_top1"] = 100 * taught.metrics["top1"]
    write_atomically(done, lambda file: file.write(json.dumps(figures).encode()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    arms: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm, results in arms.items():
            results.append(run(arm, options.epochs, options.photos, seed, options.work))
            print(f"seed {seed}, {arm}: {json.dumps(results[-1])}", file=sys.stderr, flush=True)
    figures = {
        "command": f"python benchmarks/photos_token_labels.py PHOTOS --work DIR --epochs {options.epochs} --seeds {options.seeds}",
        "epochs": options.epochs,
        **setting(torch.device("cpu")),
        "arms": {
            arm: {
                "top1": [result["top1"] for result in results],
                "mean": statistics.mean(result["top1"] for result in results),
                "stdev": statistics.stdev(result["top1"] for result in results) if len(results) > 1 else None,
                "runs": results,
            }
            for arm, results in arms.items()
        },
    }
    write_atomically(RESULT, lambda file: file.write((json.dumps(figures, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
