"""Token labels on CIFAR-10 at a small budget: does training with them help, and does the order of crops matter?

    python benchmarks/token_labels.py CIFAR10_NPZ_FOLDER --work DIR --minutes 40

Four ways to train the same small VOLO on the same 20,000 images for the same number of steps, three seeds each:

    plain       one label an image, no mixing
    own         MixToken and token labeling with the image's own label: what token labels have to beat
    corrected   MixToken and the label maps of an annotator, cropped as the images are
    original    the same maps, crops transposed as in the tool of the paper

The annotator, a larger VOLO, sees the same 20,000 images and no others. Images are shifted by up to 8 of their 32
pixels, one token of stage 2, so that the order of crops makes a difference. The number of epochs follows from the
minutes and from a few measured steps, and is the same for all. What counts is the top-1 of the last epoch on the 10,000
test images; nothing is chosen on them.

The runs go to --work, where an interrupted comparison is continued by the same command; the figures to
benchmarks/results/token_labels/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from volo.bench.timing import setting
from volo.config import DataConfig, Recipe, load_recipe, recipe_from_dict, recipe_to_toml
from volo.data.files import write_atomically
from volo.data.images import open_data
from volo.data.label_maps import LabelMaps
from volo.distributed import join_world
from volo.training.loop import train
from volo.training.pipeline import prepare_label_maps
from volo.training.probe import probe
from volo.training.report import NullReporter

NUM_TRAIN = 20_000
ANNOTATOR_SHARE = 0.2
"""Of the time, for the annotator; a tenth is left for evaluations and drawing maps, the runs share the rest."""
ARMS = {
    "plain": {"task": "classify"},
    "own": {"task": "token_label", "token_label": {"source": "own"}, "augment": {"mix_token": 1.0}},
    "corrected": {"task": "token_label", "token_label": {"crop_order": "corrected"}, "augment": {"mix_token": 1.0}},
    "original": {"task": "token_label", "token_label": {"crop_order": "original"}, "augment": {"mix_token": 1.0}},
}
BASE = {
    "model": {
        "name": "volo_nano",
        "drop_path_rate": 0.0,
        "options": {"patch_size": 4, "depths": [2, 2], "embed_dims": [64, 96], "num_heads": [2, 3], "stem_dim": 32},
    },
    "data": {"img_size": 32, "crop_pct": 1.0, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]},
    "augment": {"crop": "pad", "pad": 8, "hflip": 0.5},
    "optim": {"name": "nmuon", "lr": 5e-3, "ema_decay": 0.99},
    "schedule": {"warmup_epochs": 1, "cooldown_epochs": 0, "warmup_lr": 1e-5},
    "train": {"batch_size": 256, "channels_last": True, "eval_batch_size": 500, "tensorboard": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with data_batch_*.npz and test_batch.npz")
    parser.add_argument("--work", type=Path, required=True, help="where runs, annotator and label maps go")
    parser.add_argument("--minutes", type=float, default=40.0, help="for everything")
    parser.add_argument("--epochs", type=int, default=0, help="of each run, whatever the minutes; 0: as many as fit")
    parser.add_argument("--annotator-epochs", type=int, default=0, help="the same for the annotator")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "token_labels")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    data = smaller_data(options.cifar10, options.work / "pictures", options.num_train)
    budget = read_or_measure_epochs(options, data)
    say(f"{budget['epochs']} epochs a run, {budget['annotator_epochs']} for the annotator")

    mapped = recipe_of("corrected", 0, data, budget["epochs"], options)
    with join_world(options.device) as world:
        _, stopped = prepare_label_maps(mapped, options.work, world, NullReporter())
    if stopped is not None:
        sys.exit(f"stopped in {stopped.out}; the same command goes on")
    maps = LabelMaps.open(options.work / "label_maps")
    annotator = json.loads((options.work / "annotator" / "summary.json").read_text())
    say(
        f"annotator: {100 * annotator['final']['top1']:.2f} % of the test images; agreement in training {maps.agreement}"
    )

    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):  # arms in turns, so that a comparison cut short is still a fair one
        for arm in ARMS:
            recipe = recipe_of(arm, seed, data, budget["epochs"], options)
            out = options.work / "runs" / f"{arm}-{seed}"
            result = train(recipe, out, resume=True)
            if result.status != "completed":
                sys.exit(f"stopped in {out}; the same command goes on")
            scores[arm].append(result.metrics["top1"])
            seconds[arm].append(result.seconds)
            say(f"{arm:>10} seed {seed}: {100 * scores[arm][-1]:.2f} %  ({result.seconds:.0f} s)")
    write_results(options, budget, annotator, maps, scores, seconds, time.monotonic() - start)


def say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def smaller_data(cifar10: Path, folder: Path, num_train: int) -> Path:
    """The first so many training images and all test images as npz of raw pixels."""
    if not (folder / "test.npz").is_file():
        splits = open_data(DataConfig(path=str(cifar10)))
        folder.mkdir(parents=True, exist_ok=True)
        for name, source, count in (("train", splits.train, num_train), ("test", splits.val, len(splits.val))):
            images = np.stack([source.load(i).permute(1, 2, 0).numpy() for i in range(count)])
            arrays = {"images": images, "labels": source.targets[:count].numpy(), "classes": np.array(splits.classes)}
            write_atomically(folder / f"{name}.npz", lambda file, arrays=arrays: np.savez(file, **arrays))
    return folder


def recipe_of(arm: str, seed: int, data: Path, epochs: float, options: argparse.Namespace) -> Recipe:
    values = json.loads(json.dumps(BASE))
    for section, changes in ARMS[arm].items():
        if isinstance(changes, dict):
            values.setdefault(section, {}).update(changes)
        else:
            values[section] = changes
    values["data"]["path"] = str(data)
    values["schedule"]["epochs"] = epochs
    values["train"] |= {"seed": seed, "eval_every": epochs, "device": options.device}
    if arm in ("corrected", "original"):
        values["token_label"]["maps"] = str(options.work / "label_maps")
        values["annotator"] = {"recipe": str(options.work / "annotator.toml"), "batch_size": 500}
    return recipe_from_dict(values)


def annotator_recipe(data: Path, epochs: float, options: argparse.Namespace) -> Recipe:
    its = load_recipe(
        "cifar10_annotator",
        {"schedule.epochs": epochs, "train.eval_every": epochs, "train.device": options.device},
    )
    return dataclasses.replace(its, data=dataclasses.replace(its.data, path=str(data)))


def read_or_measure_epochs(options: argparse.Namespace, data: Path) -> dict[str, float]:
    """How many epochs fit, from a few steps of each kind; kept, so that a continued comparison is the same one."""
    kept = options.work / "budget.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    budget_seconds = 60 * options.minutes
    if options.epochs and options.annotator_epochs:
        budget: dict[str, float] = {"epochs": options.epochs, "annotator_epochs": options.annotator_epochs}
        return keep_budget(budget, options, data)
    longest = 0.0
    for arm in ("plain", "own"):
        measured = probe(recipe_of(arm, 0, data, 2, options), steps=12)
        longest = max(longest, measured.seconds_a_step * measured.workload.steps_per_epoch)
    measured = probe(annotator_recipe(data, 3, options), steps=8)
    its = measured.seconds_a_step * measured.workload.steps_per_epoch
    runs = options.seeds * len(ARMS)
    # Reading maps costs a little more than labels do.
    epochs = (1 - ANNOTATOR_SHARE - 0.1) * budget_seconds / runs / (1.1 * longest)
    budget = {
        "epochs": options.epochs or max(2, int(epochs)),
        "annotator_epochs": options.annotator_epochs or max(3, int(ANNOTATOR_SHARE * budget_seconds / its)),
        "seconds_an_epoch": longest,
    }
    return keep_budget(budget, options, data)


def keep_budget(budget: dict[str, float], options: argparse.Namespace, data: Path) -> dict[str, float]:
    recipe = annotator_recipe(data, budget["annotator_epochs"], options)
    text, figures = recipe_to_toml(recipe).encode(), json.dumps(budget).encode()
    write_atomically(options.work / "annotator.toml", lambda file: file.write(text))
    write_atomically(options.work / "budget.json", lambda file: file.write(figures))
    return budget


def write_results(
    options: argparse.Namespace,
    budget: dict[str, float],
    annotator: dict,
    maps: LabelMaps,
    scores: dict[str, list[float]],
    seconds: dict[str, list[float]],
    total_seconds: float,
) -> None:
    def spread(values: list[float]) -> float | None:
        return statistics.stdev(values) if len(values) > 1 else None

    def points(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}"

    rows = [
        {
            "arm": arm,
            "top1": values,
            "mean": statistics.mean(values),
            "stdev": spread(values),
            "seconds": seconds[arm],
        }
        for arm, values in scores.items()
    ]
    pairs = []
    for a, b in (("corrected", "plain"), ("corrected", "own"), ("own", "plain"), ("corrected", "original")):
        differences = [x - y for x, y in zip(scores[a], scores[b])]
        pairs.append({"what": f"{a} - {b}", "mean": statistics.mean(differences), "stdev": spread(differences)})
    recipe = recipe_of("corrected", 0, Path("pictures"), budget["epochs"], options).to_dict()
    result = {
        "what": "token labels against plain labels, CIFAR-10, small budget",
        "command": f"python benchmarks/token_labels.py CIFAR10 --work DIR --epochs {budget['epochs']} "
        f"--annotator-epochs {budget['annotator_epochs']} --seeds {options.seeds}",
        **setting(torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")),
        "num_train": options.num_train,
        "budget": budget,
        "seconds": total_seconds,
        "annotator": {
            "model": annotator["model"],
            "num_parameters": annotator["num_parameters"],
            "top1": annotator["final"]["top1"],
            "agreement": maps.agreement,
            "grid": list(maps.grid),
        },
        "rows": rows,
        "differences": pairs,
        "model": recipe["model"],
        "augment": recipe["augment"],
    }
    lines = [
        "# Token labels on CIFAR-10 at a small budget",
        "",
        f"{options.num_train:,} training and 10,000 test images, {budget['epochs']} epochs of batch 256, {options.seeds} seeds; "
        f"top-1 of the last epoch. Made by `{result['command']}`; machine and versions are in cifar10.json.",
        f"Annotator: {annotator['model']}, {100 * annotator['final']['top1']:.2f} % on the test images, trained on the same "
        "pictures.",
        "",
        "| | top-1, mean | standard deviation | each seed |",
        "|---|---|---|---|",
        *(
            f"| {row['arm']} | {100 * row['mean']:.2f} % | {points(row['stdev'])} | {', '.join(f'{100 * v:.2f}' for v in row['top1'])} |"
            for row in rows
        ),
        "",
        "| difference, seed by seed | mean, points | standard deviation |",
        "|---|---|---|",
        *(f"| {pair['what']} | {100 * pair['mean']:+.2f} | {points(pair['stdev'])} |" for pair in pairs),
        "",
    ]
    for name, text in (("cifar10.json", json.dumps(result, indent=1)), ("README.md", "\n".join(lines))):
        write_atomically(options.out / name, lambda file, text=text: file.write(text.encode()))
    say("\n".join(lines))


if __name__ == "__main__":
    main()
