"""VOLO against networks of timm of about its size: the same images, the same recipe, the same training loop.

    python benchmarks/peers.py --pictures PICTURES64 --photos PHOTOS --cifar10 CIFAR10_NPZ --work DIR
    python benchmarks/peers.py ... --maps MAPS      (label maps of volo annotate: three more ways to train VOLO)
    python benchmarks/peers.py --speed              (images per second of one core; best while nothing else runs)

Every network is pretrained on the first files of pictures64 (17,170 images of 202 classes; scored on all 5,050 held-out ones),
then used in three ways on photos (a folder) and on CIFAR-10 (200 training images a class, 2,000 test images):

    probe      a regression on frozen features: what the network's own head sees, and of all positions the maximum and, where
               the head sees a class token, the mean
    tuned      all of it trained on, with a new head
    scratch    the same training from random weights

All at 64 px. Only the weights of the last epoch are scored; nothing is chosen on held-out images. The recipe was made for
VOLO; "adamw" repeats the pretraining with the optimizer that most recipes have.

Each part is kept in the results as soon as it is done: the same command goes on where it was interrupted. Runs go to --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transfer import Network, draw, extract, keep, volo_features

from volo.bench.timing import alternate, setting
from volo.config import DataConfig, Recipe, recipe_from_dict
from volo.data.arrays import ArraySource, find_npz
from volo.data.files import write_atomically
from volo.data.images import open_data
from volo.data.label_maps import LabelMaps
from volo.inference.regression import fit_probe
from volo.models.checkpoint import load_checkpoint
from volo.models.factory import create_model
from volo.models.fuse import use_training_kernels
from volo.models.volo import VOLO
from volo.tasks.classify import ClassifyTask
from volo.training.loop import train
from volo.training.optim import create_optimizer
from volo.training.report import NullReporter, TrainResult
from volo.training.settings import keep_freed_memory
from volo.training.workloads.classification import Classification

NUM_CLASSES, SIZE = 202, 64
FEW_TRAIN, FEW_TEST = 200, 2000
"""Images of CIFAR-10: for training, a class, and for testing, in all."""
PRETRAINING: dict[str, Any] = {
    "model": {"name": "volo_nano", "drop_path_rate": 0.0},
    "data": {"img_size": SIZE, "crop_pct": 1.0},
    "augment": {"crop": "resized", "scale": [0.3, 1.0], "hflip": 0.5, "color_jitter": 0.3},
    "loss": {"label_smoothing": 0.1},
    "optim": {"name": "nmuon", "lr": 5e-3, "weight_decay": 0.05, "ema_decay": 0.999},
    "schedule": {
        "epochs": 6, "cooldown_epochs": 0, "warmup_lr": 1e-5, "min_lr": 1e-5, "small_size": 48, "small_epochs": 5,
    },
    "train": {
        "batch_size": 128, "channels_last": True, "eval_every": 0, "eval_batch_size": 500, "tensorboard": False, "device": "cpu",
    },
}  # fmt: skip
TUNING: dict[str, dict[str, Any]] = {
    "optim": {"lr": 2e-3},
    "schedule": {"small_size": 0, "small_epochs": 0},
    "train": {"batch_size": 64},
}
"""What is different where a pretrained network, or one from scratch, is trained on few images."""
COMMAND = "python benchmarks/peers.py --pictures PICTURES64 --photos PHOTOS --cifar10 CIFAR10 --work DIR --maps MAPS"
ADAMW = {"optim": {"name": "adamw", "lr": 2e-3}}
WARMUP_SHARE = 1 / 16


def mobilenet(name: str, stem_stride: int) -> nn.Module:
    body = timm.create_model(name, num_classes=0)
    cast(nn.Conv2d, body.conv_stem).stride = (stem_stride, stem_stride)
    return body


def vit() -> nn.Module:
    return VisionTransformer(
        SIZE, 8, num_classes=0, embed_dim=144, depth=5, num_heads=3, class_token=False, global_pool="avg", dynamic_img_size=True
    )  # fmt: skip


def resnet() -> nn.Module:
    """A ResNet-18 a third as wide, whose stem shrinks images by 2 in place of 4."""
    body = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=0, channels=(22, 44, 88, 176))
    body.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    body.maxpool = nn.Identity()
    return body


def convnext() -> nn.Module:
    """Without the scale of layers, which begins at 1e-6 and is meant for long trainings."""
    return ConvNeXt(num_classes=0, depths=(2, 2, 4, 2), dims=(28, 56, 112, 224), patch_size=2, ls_init_value=None)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "mobilenetv3_small_050": lambda: mobilenet("mobilenetv3_small_050", 2),
    "mobilenetv3_small_075, stem stride 1": lambda: mobilenet("mobilenetv3_small_075", 1),
    "vit, 5 blocks of 144": vit,
    "resnet-18, width 22": resnet,
    "convnext, width 28": convnext,
}
VOLOS: dict[str, dict[str, Any]] = {
    "volo_nano": {},
    "volo_nano, label on every token": {"loss": {"token_weight": 0.5}},
    "volo_nano, label maps": {"task": "token_label"},
    "volo_nano, label maps, true class": {"task": "token_label", "token_label": {"ground_truth": "only"}},
    "volo_nano, label maps and MixToken": {"task": "token_label", "augment": {"mix_token": 1.0}},
}
"""Ways to train VOLO: what is different from `PRETRAINING`."""
WITH_MAPS = [name for name, changes in VOLOS.items() if changes.get("task") == "token_label"]
"""These are pretrained only; there are no label maps of photos and CIFAR-10."""


class Peer(nn.Module):
    """A network of timm without its head, and a head: images [B, 3, H, W] -> logits [B, num_classes].

    The head bears the name by which the optimizer finds it, and begins as VOLO's does.
    """

    def __init__(self, body: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.body: Any = body
        self.num_classes = num_classes
        self.head = nn.Linear(getattr(body, "head_hidden_size", None) or cast(int, body.num_features), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body.forward_head(self.body.forward_features(images), pre_logits=True))

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, and the maximum of the last features over all positions: [B, F]."""
        places = self.body.forward_features(images)
        highest = places.amax(dim=1) if places.dim() == 3 else places.amax(dim=(2, 3))
        return torch.cat([self.body.forward_head(places, pre_logits=True), highest], dim=1)

    def no_weight_decay(self) -> set[str]:
        own = getattr(self.body, "no_weight_decay", set)()
        return {f"body.{name}" for name in own}


class PeerClassification(Classification):
    """The workload of task "classify" for a `Peer`: `model.name` is one of `BODIES`, `model.weights` a checkpoint."""

    def create_model(self) -> Peer:  # type: ignore[override]
        torch.manual_seed(self.recipe.train.seed)
        peer = Peer(BODIES[self.recipe.model.name](), len(self.classes))
        if self.recipe.model.weights:
            peer.body.load_state_dict(trained_peer(Path(self.recipe.model.weights)).body.state_dict())
        return peer

    def restore_model(self, config: dict[str, Any]) -> Peer:  # type: ignore[override]
        return Peer(BODIES[config["name"]](), config["num_classes"])

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        return {"name": self.recipe.model.name, "num_classes": len(self.classes)}

    def create_task(self, model: nn.Module) -> ClassifyTask:
        return ClassifyTask(model, self.recipe.loss, self.recipe.augment)


def trained_peer(weights: Path) -> Peer:
    checkpoint = load_checkpoint(weights)
    peer = Peer(BODIES[checkpoint["model_config"]["name"]](), checkpoint["model_config"]["num_classes"])
    peer.load_state_dict(checkpoint["ema"])
    return peer.eval()


def new_network(name: str) -> nn.Module:
    return Peer(BODIES[name](), NUM_CLASSES) if name in BODIES else create_model("volo_nano", num_classes=NUM_CLASSES)


@dataclass(frozen=True)
class Comparison:
    """Where everything lies."""

    work: Path
    pictures: Path
    photos: Path
    cifar10: Path
    maps: Path | None
    epochs: float
    few_epochs: float
    threads: int

    def recipe(self, name: str, seed: int, data: Path, epochs: float, *changes: dict[str, Any]) -> Recipe:
        own = {
            "data": {"path": str(data)},
            "schedule": {"epochs": epochs, "warmup_epochs": WARMUP_SHARE * epochs},
            "train": {"seed": seed, "threads": self.threads},
        }
        values: dict[str, Any] = {}
        for change in (PRETRAINING, VOLOS.get(name, {}), own, *changes):
            for section, its in change.items():
                values[section] = {**values.get(section, {}), **its} if isinstance(its, dict) else its
        if name in BODIES:
            values["model"] |= {"name": name}
        elif values.get("task") == "token_label":
            values["token_label"] = {"maps": str(self.maps), **values.get("token_label", {})}
        return recipe_from_dict(values)

    def pretrain(self, name: str, seed: int, what: str = "pretrained") -> dict[str, Any]:
        changes = ADAMW if what == "adamw" else {}
        return self.run(self.recipe(name, seed, self.pictures, self.epochs, changes), self.folder(name, seed, what))

    def tune(self, name: str, seed: int, what: str, kind: str) -> dict[str, Any]:
        weights = self.folder(name, seed) / "last.pt" if what == "tuned" else ""
        model = {"model": {"weights": str(weights)}}
        recipe = self.recipe(name, seed, self.few(kind), self.few_epochs, TUNING, model)
        return self.run(recipe, self.folder(name, seed, f"{what}_{kind}"))

    def probe(self, name: str, seed: int, kind: str) -> dict[str, Any]:
        weights, config = self.folder(name, seed) / "last.pt", DataConfig()
        if name in BODIES:
            look: Callable[[Tensor], Tensor] = trained_peer(weights).features
        else:
            look = partial(volo_features, create_model("volo_nano", weights).eval())
        network = Network(look, config.mean, config.std, 0)
        splits = open_data(DataConfig(path=str(self.few(kind))))
        features, labels = map(torch.from_numpy, extract(network, splits.train, SIZE))
        regression = fit_probe(features, labels, len(splits.classes))
        features, labels = map(torch.from_numpy, extract(network, splits.val, SIZE))
        answers = F.linear(features, regression.weight, regression.bias).argmax(dim=1)
        return {"top1": float((answers == labels).float().mean()), "penalty": regression.penalty}

    def run(self, recipe: Recipe, out: Path) -> dict[str, Any]:
        """Train, or go on, and say how good it is in the end."""
        workload = PeerClassification if recipe.model.name in BODIES else None
        result: TrainResult = train(recipe, out, resume=True, reporter=NullReporter(), workload=workload)
        if result.status != "completed":
            sys.exit(f"stopped in {out}; the same command goes on")
        figures = {key: result.metrics[key] for key in ("top1", "top5", "mean_class_accuracy", "loss")}
        return {**figures, "steps": result.step, "seconds": round(result.seconds)}

    def folder(self, name: str, seed: int, what: str = "pretrained") -> Path:
        return self.work / "runs" / f"{name.replace(',', '').replace(' ', '_')}-{seed}" / what

    def few(self, kind: str) -> Path:
        return self.photos if kind == "photos" else self.cifar10


Part = tuple[tuple[str, str, str], Callable[[], dict[str, Any]]]
"""A network, what is scored and the seed; and who does it."""


def parts(comparison: Comparison, seeds: int) -> Iterator[Part]:
    """In the order in which they are of most use if there is no time for all."""
    plain = [name for name in (*VOLOS, *BODIES) if name not in WITH_MAPS]
    names = [name for name in (*VOLOS, *BODIES) if comparison.maps or name not in WITH_MAPS]

    def pretrainings(names: Iterable[str], seed: int) -> Iterator[Part]:
        for name in names:
            yield (name, "pretrained", str(seed)), partial(comparison.pretrain, name, seed)

    def uses(seed: int) -> Iterator[Part]:
        for kind in ("photos", "cifar10"):
            for name in plain:
                for what in ("tuned", "scratch"):
                    yield (name, f"{what} {kind}", str(seed)), partial(comparison.tune, name, seed, what, kind)

    def probes(seed: int) -> Iterator[Part]:
        for kind in ("photos", "cifar10"):
            for name in names:
                yield (name, f"probe {kind}", str(seed)), partial(comparison.probe, name, seed, kind)

    yield from pretrainings(names, 0)
    yield from probes(0)
    for seed in range(1, seeds):  # labels of tokens against plain ones
        yield from pretrainings((name for name in VOLOS if name in names), seed)
    yield from uses(0)
    for seed in range(1, seeds):
        yield from pretrainings(names, seed)
        yield from probes(seed)
        yield from uses(seed)
    for name in plain:
        yield (name, "adamw", "0"), partial(comparison.pretrain, name, 0, "adamw")


def first_files(pictures: Path, folder: Path, count: int) -> Path:
    """The first `count` training files of a folder of npz files, and its test files: the same images by the same names, so
    that label maps of all of them are maps of these too."""
    found = find_npz(pictures, "auto")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*found.train[:count], *found.val, "classes.txt"):
        if not (folder / name).is_file():
            shutil.copyfile(pictures / name, folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)
    return folder


def few_of(cifar10: Path, folder: Path) -> Path:
    """`FEW_TRAIN` training images a class of CIFAR-10 and the first `FEW_TEST` test images, as npz files."""
    if not (folder / "test.npz").is_file():
        splits = open_data(DataConfig(path=str(cifar10), img_size=32))
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {"train": draw(splits.train.targets.numpy(), FEW_TRAIN, 0), "test": np.arange(FEW_TEST)}
        for name, indices in chosen.items():
            source = cast(ArraySource, splits.train if name == "train" else splits.val).select(indices.tolist())
            images = source.images.permute(0, 2, 3, 1).numpy()
            arrays = {"images": images, "labels": source.targets.numpy(), "classes": np.array(splits.classes)}
            write_atomically(folder / f"{name}.npz", lambda file, arrays=arrays: np.savez(file, **arrays))
    return folder


def sizes(name: str) -> dict[str, Any]:
    """Parameters, with the heads for the classes of pictures64, and multiply-adds of one image of 64 px."""
    with torch.device("meta"):
        model = new_network(name).eval()
        images = torch.empty(1, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    heads = ("head.", "aux_head.")
    body = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(heads))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_without_heads": body,
        "multiply_adds": counter.get_total_flops() // 2,
    }


def speeds(rounds: int, batch_size: int) -> dict[str, Any]:
    """Images of 64 px per second of one core, networks in turns: of a training step as the loop makes it, and of inference.

    One thread and its processor time, so that a machine which others use as well tells nearly the same.
    """
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    images = torch.randn(batch_size, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch_size) % NUM_CLASSES
    names = ("volo_nano", "volo_nano, label on every token", *BODIES)
    inference, steps = {}, {}
    for name in names:
        torch.manual_seed(0)
        model = new_network(name).eval()
        if isinstance(model, VOLO):
            model.fuse_for_inference()
        inference[name] = looking(model.to(memory_format=torch.channels_last), images)  # type: ignore[call-overload]
        steps[name] = stepping(new_network(name), name, {"image": images, "target": target})
    rates: dict[str, Any] = {name: {} for name in names}
    for what, candidates in (("inference", inference), ("training", steps)):
        for name, timing in alternate(candidates, rounds=rounds, warmup=1, clock=time.process_time).items():
            low, high = (batch_size / seconds for seconds in reversed(timing.quartiles))
            rates[name][what] = {"images_per_second": batch_size / timing.median, "quartiles": [low, high]}
    return {
        "what": "images per second of one core, by its processor time",
        "command": "python benchmarks/peers.py --speed",
        "batch_size": batch_size,
        "rounds": rounds,
        "load_before": load,
        **setting(torch.device("cpu")),
        "networks": rates,
    }


def looking(model: nn.Module, images: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> None:
        model(images)

    return run


def stepping(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Callable[[], object]:
    recipe = recipe_from_dict(
        {key: value for key, value in {**PRETRAINING, **VOLOS.get(name, {})}.items() if key != "model"}
    )
    task = ClassifyTask(model.train(), recipe.loss, recipe.augment).train()
    use_training_kernels(task)
    task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer(model, recipe.optim, recipe.peak_lr)

    def run() -> None:
        task(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="pictures64: data_batch_*.npz, test_batch.npz, classes.txt")
    parser.add_argument("--photos", type=Path, help="folder of photos, a folder a class in train/ and val/")
    parser.add_argument("--cifar10", type=Path, help="folder with data_batch_*.npz and test_batch.npz")
    parser.add_argument("--maps", type=Path, help="label maps of the pictures (volo annotate)")
    parser.add_argument("--work", type=Path, help="where the runs go")
    parser.add_argument(
        "--files", type=int, default=2, help="training files of pictures64, in the order of their names"
    )
    parser.add_argument("--epochs", type=float, default=PRETRAINING["schedule"]["epochs"])
    parser.add_argument(
        "--few-epochs", type=float, default=PRETRAINING["schedule"]["epochs"], help="on photos and CIFAR-10"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--speed", action="store_true", help="only measure images per second, and keep that")
    parser.add_argument("--rounds", type=int, default=7, help="of measuring speed")
    parser.add_argument(
        "--out", type=Path, help="results; peers.json, of --speed peers_speed.json, in benchmarks/results"
    )
    options = parser.parse_args()
    keep_freed_memory()
    out = options.out or Path(__file__).parent / "results" / ("peers_speed.json" if options.speed else "peers.json")
    if options.speed:
        keep(out, speeds(options.rounds, PRETRAINING["train"]["batch_size"]))
        return
    missing = [name for name in ("pictures", "photos", "cifar10", "work") if getattr(options, name) is None]
    if missing:
        parser.error(f"needed: {', '.join('--' + name for name in missing)}")
    how = {
        "pretraining": PRETRAINING, "tuning": TUNING, "adamw": ADAMW, "ways to train VOLO": VOLOS,
        "files": options.files, "epochs": options.epochs, "few_epochs": options.few_epochs,
    }  # fmt: skip
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if results.setdefault("how", how) != how:
        sys.exit(f"{out} holds results of another recipe or budget: choose another --out, and another --work")
    results |= {
        "what": "VOLO against networks of timm, by one recipe",
        "command": COMMAND,
        "setting": setting(torch.device("cpu")),
    }
    pictures = first_files(options.pictures, options.work / "pictures", options.files)
    cifar10 = few_of(options.cifar10, options.work / "cifar10")
    comparison = Comparison(
        options.work,
        pictures,
        options.photos,
        cifar10,
        options.maps,
        options.epochs,
        options.few_epochs,
        options.threads,
    )
    if options.maps:
        maps = LabelMaps.open(options.maps)
        own = {key: maps.annotator.get(key) for key in ("model", "img_size")}
        results["maps"] = {**own, "grid": list(maps.grid), "top": maps.top, "agreement": maps.agreement}
    networks = results.setdefault("networks", {})
    for name in (*VOLOS, *BODIES):
        networks.setdefault(name, {})["size"] = sizes(name)
    for (name, what, seed), make in parts(comparison, options.seeds):
        done = networks[name].setdefault(what, {})
        if seed not in done:
            done[seed] = make()
            keep(out, results)
            say(f"{name}, {what}, seed {seed}: {json.dumps(done[seed])}")


if __name__ == "__main__":
    main()
