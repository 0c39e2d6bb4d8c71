"""How well features transfer: a linear probe on frozen networks, for folders of photos, CIFAR-10 and crops of CamVid.

    python benchmarks/transfer.py --photos FOLDER --cifar10 CIFAR10_NPZ --camvid CAMVID \\
        --network volo_nano=WEIGHTS@64,96,128 --network volo_nano=random@96 --network tf_efficientnet_lite0=FILE@224 --out FILE.json

A network is NAME=WEIGHTS@SIZES: a VOLO (a checkpoint, a safetensors file, or "pretrained", or "random") or a model of timm
(a weight file, or "random"). The features of a VOLO are the class token, the mean and the maximum of the other tokens; those
of another network are what its own head sees. On them, standardised, a multinomial logistic regression is fitted; its L2
strength is chosen by five-fold cross-validation on the training images alone, and the held-out images are looked at once.

Data sets:
    photos     all training images of a folder, scored on its held-out ones; then, for the spread, 20 images a class, three draws
    cifar10    200 training images a class, three draws; scored on the first test images
    camvid     windows of 96 px of the training images in which one of seven classes has most pixels, scored on windows of test
    digits     scikit-learn's handwritten digits of 8 x 8 pixels, every fifth held out; then 20 a class

The recipe `photos` is tried on the same images. They are written as folders (of CIFAR-10 the first draw), and what the runs
reached is noted:

    python benchmarks/transfer.py --cifar10 CIFAR10_NPZ --camvid CAMVID --digits --folders DIR
    volo train photos --data DIR/cifar10 --out RUN
    python benchmarks/transfer.py --run cifar10=RUN --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from volo.bench.timing import setting
from volo.config import DataConfig, load_recipe
from volo.data.files import write_atomically
from volo.data.images import open_data
from volo.data.loader import EvalLoader
from volo.data.sources import ArraySource, ImageSource
from volo.data.transforms import PixelPipeline
from volo.models.factory import create_model, list_models
from volo.models.volo import VOLO

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for scikit-learn's C, the inverse of the L2 penalty."""
CAMVID_CLASSES = {0: "sky", 1: "building", 3: "road", 4: "pavement", 5: "tree", 8: "car", 9: "pedestrian"}
CAMVID_SHARE = {8: 0.4, 9: 0.15}
"""Pixels of a window that its class must have; 0.7 for all that are not here."""
CAMVID_WINDOW = 96
CAMVID_PER_CLASS = 60
RECIPE = "recipe photos"
"""The key of what its runs reached, beside the networks with their probes."""


@dataclass(frozen=True)
class Network:
    """A frozen network and the images it wants."""

    features: Callable[[Tensor], Tensor]
    """Normalised images [B, 3, H, W] -> features [B, F]."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_parameters: int


def open_network(name: str, weights: str) -> Network:
    """Raises ValueError and FileNotFoundError as `create_model` and timm do."""
    torch.manual_seed(0)
    if name in list_models():
        pretrained = {"random": False, "pretrained": True}.get(weights, weights)
        volo = create_model(name, pretrained).eval()
        volo.set_grad_checkpointing(False)
        return Network(lambda x: volo_features(volo, x), DataConfig().mean, DataConfig().std, count(volo))
    import timm

    model = timm.create_model(name)
    if weights != "random":
        model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval().to(memory_format=torch.channels_last)

    def pooled(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return model.forward_head(model.forward_features(images), pre_logits=True)

    return Network(pooled, model.pretrained_cfg["mean"], model.pretrained_cfg["std"], count(model))


def volo_features(model: VOLO, images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 3 C]: class token, mean and maximum of the other tokens."""
    tokens = model.forward_features(images)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1), tokens[:, 1:].amax(dim=1)], dim=1)


def count(model: nn.Module) -> int:
    """Parameters without the layers that name classes, which a probe has no use for."""
    heads = ("head.", "aux_head.", "classifier.", "fc.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(heads))


@torch.inference_mode()
def extract(network: Network, source: ImageSource, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, F] and labels [N] of all images, their shorter side scaled to `size`, the centre cropped."""
    data = DataConfig(img_size=size, crop_pct=1.0, mean=network.mean, std=network.std, interpolation="bicubic")
    pixels = PixelPipeline(data).eval()
    features, labels = [], []
    for batch in EvalLoader(source, data, batch_size=50, num_workers=0):
        features.append(network.features(pixels(batch["image"])))
        labels.append(batch["target"])
    return torch.cat(features).float().numpy(), torch.cat(labels).numpy()


@dataclass(frozen=True)
class Probe:
    """A regression on standardised features."""

    strength: float
    predict: Callable[[np.ndarray], np.ndarray]


def fit_probe(features: np.ndarray, labels: np.ndarray) -> Probe:
    """Logistic regression whose strength does best in five-fold cross-validation (fewer folds for rare classes)."""
    centre, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = (features - centre) / spread
    folds = StratifiedKFold(min(5, int(np.bincount(labels).min())), shuffle=True, random_state=0)
    right = dict.fromkeys(STRENGTHS, 0)
    for kept, held in folds.split(x, labels):
        for strength, regression in fitted(x[kept], labels[kept], STRENGTHS):
            right[strength] += int((regression.predict(x[held]) == labels[held]).sum())
    best = max(STRENGTHS, key=lambda strength: right[strength])  # of equals the strongest penalty
    regression = fitted(x, labels, [best])[0][1]
    return Probe(best, lambda new: regression.predict((new - centre) / spread))


def fitted(x: np.ndarray, labels: np.ndarray, strengths: Sequence[float]) -> list[tuple[float, LogisticRegression]]:
    regressions = []
    for strength in strengths:
        regression = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weak penalties do not converge, and are not chosen
            regression.fit(x, labels)
        regressions.append((strength, regression))
    return regressions


def draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` images of each class (all, where it has fewer), in order."""
    random = np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def score(features: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    probe = fit_probe(*features)
    right = probe.predict(held[0]) == held[1]
    per_class = [right[held[1] == label].mean() for label in np.unique(held[1])]
    return {"top1": float(right.mean()), "mean_class": float(np.mean(per_class)), "strength": probe.strength}


def spread_of(
    features: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], per_class: int, count: int
) -> dict:
    """Scores of `count` training sets of `per_class` images a class."""
    draws = []
    for seed in range(count):
        chosen = draw(features[1], per_class, seed)
        draws.append(score((features[0][chosen], features[1][chosen]), held)["top1"])
    return {"per_class": per_class, "top1": draws, "mean": statistics.mean(draws), "stdev": statistics.pstdev(draws)}


def camvid_windows(root: Path, split: str) -> ArraySource:
    """Square windows named by the class that has most of their pixels, `CAMVID_PER_CLASS` of each at most."""
    names = (root / f"{split}.txt").read_text(encoding="utf-8").split()
    random = np.random.default_rng(0)
    side = CAMVID_WINDOW
    images: list[np.ndarray] = []
    labels: list[int] = []
    taken = dict.fromkeys(CAMVID_CLASSES, 0)
    for name in random.permutation([name for name in names if name]):
        stem = Path(name).stem
        pixels = np.asarray(Image.open(root / "images" / split / f"{stem}.jpg").convert("RGB"))
        classes = np.asarray(Image.open(root / "annotations" / split / f"{stem}.png"))
        found: set[int] = set()  # one window a class and image: neighbours look alike
        for _ in range(40):
            top, left = random.integers(classes.shape[0] - side), random.integers(classes.shape[1] - side)
            window = classes[top : top + side, left : left + side]
            share = np.bincount(window.ravel(), minlength=12) / window.size
            for index, (kind, _) in enumerate(CAMVID_CLASSES.items()):
                if kind in found or taken[kind] >= CAMVID_PER_CLASS or share[kind] < CAMVID_SHARE.get(kind, 0.7):
                    continue
                images.append(pixels[top : top + side, left : left + side])
                labels.append(index)
                found.add(kind)
                taken[kind] += 1
                break
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ArraySource(
        stacked, torch.tensor(labels), [f"{split}/{i}" for i in range(len(labels))], tuple(CAMVID_CLASSES.values())
    )


def digits() -> tuple[ArraySource, ArraySource]:
    """Training images and every fifth, held out; uint8 [N, 3, 8, 8]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = torch.from_numpy((scans.images * (255 / 16)).round().astype(np.uint8))
    images, labels = pixels[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(scans.target).long()
    whole = ArraySource(images, labels, [f"{i}" for i in range(len(labels))], tuple(map(str, range(10))))
    held = [i for i in range(len(labels)) if i % 5 == 0]
    return whole.select([i for i in range(len(labels)) if i % 5]), whole.select(held)


def open_sets(options: argparse.Namespace) -> dict[str, tuple[ImageSource, ImageSource, int]]:
    """(training, held-out, images a class of the draws) of each data set that was named."""
    sets: dict[str, tuple[ImageSource, ImageSource, int]] = {}
    if options.photos:
        splits = open_data(DataConfig(path=str(options.photos)))
        sets["photos"] = splits.train, splits.val, 20
    if options.cifar10:
        splits = open_data(DataConfig(path=str(options.cifar10), img_size=32))
        # Images that no draw takes need no features.
        labels = splits.train.targets.numpy()
        used = np.unique(np.concatenate([draw(labels, 200, seed) for seed in range(options.draws)]))
        train, test = splits.train, splits.val
        if not (isinstance(train, ArraySource) and isinstance(test, ArraySource)):
            raise ValueError(f"{options.cifar10} is no folder of npz files")
        sets["cifar10"] = train.select(used.tolist()), test.select(range(options.test)), 200
    if options.camvid:
        sets["camvid"] = camvid_windows(options.camvid, "train"), camvid_windows(options.camvid, "test"), 30
    if options.digits:
        sets["digits"] = *digits(), 20
    return sets


def write_folders(sets: dict[str, tuple[ImageSource, ImageSource, int]], out: Path) -> None:
    """DIR/SET/train/CLASS/*.png and DIR/SET/val/CLASS/*.png; FileExistsError for a set that is there."""
    for kind, (train, held, per_class) in sets.items():
        chosen = draw(train.targets.numpy(), per_class, 0) if kind == "cifar10" else range(len(train))
        (out / kind).mkdir(parents=True)
        for split, source, indices in (("train", train, chosen), ("val", held, range(len(held)))):
            for index in map(int, indices):
                folder = out / kind / split / source.classes[int(source.targets[index])]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(source.load(index).permute(1, 2, 0).numpy()).save(folder / f"{index:05}.png")


def reached(run: Path) -> dict[str, Any]:
    """What a run of the recipe `photos` came to: its probe's score, that of the last epoch, of the best."""
    content = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    scores = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    probe = next((score["top1"] for score in scores if score["kind"] == "eval" and score["step"] == 0), None)
    return {
        "images": [content["num_train"], content["num_val"]],
        "probe": probe,
        "final": content["final"]["top1"],
        "best": content["best"]["top1"],
        "img_size": load_recipe(run / "recipe.toml").data.img_size,
        "epochs": round(content["epoch"]),
        "seconds": content["seconds"],
        "setting": setting(torch.device("cpu")) | {key: content[key] for key in ("date", "threads")},
    }


def keep(path: Path, results: dict[str, Any]) -> None:
    content = (json.dumps(results, indent=1) + "\n").encode()
    write_atomically(path, lambda file: file.write(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photos, a folder a class")
    parser.add_argument("--cifar10", type=Path, help="folder with data_batch_*.npz and test_batch.npz")
    parser.add_argument("--camvid", type=Path, help="folder with images/, annotations/, train.txt and test.txt")
    parser.add_argument("--digits", action="store_true", help="the handwritten digits that scikit-learn ships")
    parser.add_argument("--network", action="append", default=[], metavar="NAME=WEIGHTS@SIZES")
    parser.add_argument("--folders", type=Path, help="write the sets' images here, for the recipe photos")
    parser.add_argument(
        "--run", action="append", default=[], metavar="SET=RUN", help="note what a run of that recipe reached"
    )
    parser.add_argument("--draws", type=int, default=3, help="small training sets of each data set")
    parser.add_argument("--test", type=int, default=2000, help="test images of CIFAR-10")
    parser.add_argument("--out", type=Path, help="JSON; what it holds of other networks and sets is kept")
    options = parser.parse_args()
    if (options.network or options.run) and not options.out:
        parser.error("--network and --run need --out, the file for what is found")
    sets = open_sets(options)
    if options.folders:
        write_folders(sets, options.folders)
    if not options.out:
        return
    results: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for kind, _, run in (wanted.partition("=") for wanted in options.run):
        results.setdefault(
            RECIPE, {"command": f"volo train photos --data FOLDER, of which {Path(__file__).name} made the folders"}
        )
        results[RECIPE][kind] = reached(Path(run))
        keep(options.out, results)
    for wanted in options.network:
        name, _, rest = wanted.partition("=")
        weights, _, sizes = rest.rpartition("@")
        network = open_network(name, weights)
        for size in map(int, sizes.split(",")):
            label = weights if weights in ("random", "pretrained") else Path(weights).name
            entry = results.setdefault(f"{name} {label} {size} px", {})
            entry |= {"parameters": network.num_parameters, "command": " ".join(["transfer.py", f"--network {wanted}"])}
            entry["setting"] = setting(torch.device("cpu"))
            for kind, (train, held, per_class) in sets.items():
                start = time.process_time()
                train_features, held_features = extract(network, train, size), extract(network, held, size)
                seconds = time.process_time() - start
                result: dict[str, Any] = {"images": [len(train), len(held)], "features_cpu_seconds": round(seconds, 1)}
                if kind != "cifar10":
                    result["all"] = score(train_features, held_features)
                result["draws"] = spread_of(train_features, held_features, per_class, options.draws)
                entry[kind] = result
                keep(options.out, results)
                print(f"{name} {label} {size} px {kind}: {json.dumps(result)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
