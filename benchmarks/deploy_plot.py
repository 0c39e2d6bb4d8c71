"""Accuracy against speed, from benchmarks/results/deploy_d1.json: `python benchmarks/deploy_plot.py [FILE.json OUT.png]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"volo_d1": "VOLO-D1", "caformer_s18": "CAFormer-S18", "convnext_tiny": "ConvNeXt-T", "deit3_small": "DeiT III-S", "swin_tiny": "Swin-T"}  # fmt: skip
FILES = {
    # Colours that stay apart for every kind of colour vision; shapes say the same.
    "openvino fp32": ("OpenVINO float32", "#0072B2", "o"),
    "openvino bf16": ("OpenVINO bfloat16", "#009E73", "s"),
    "openvino int8": ("OpenVINO int8", "#D55E00", "^"),
}


def draw(result: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = result["batch_sizes"]
    figure, axes = plt.subplots(1, len(batches), figsize=(5.2 * len(batches), 4.2), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches):
        rows = [row for row in result["rows"] if row["batch_size"] == batch and row["model"] in NAMES]
        for what, (_, colour, shape) in FILES.items():
            for row in (row for row in rows if row["file"] == what):
                is_ours = row["model"] == result["model"]
                axis.scatter(
                    row["images_per_second"], row["top1"], s=90 if is_ours else 45, c=colour, marker=shape,
                    edgecolors="black" if is_ours else "none", linewidths=1.2, zorder=3,
                )  # fmt: skip
        for model, name in NAMES.items():
            own = [row for row in rows if row["model"] == model and row["file"] in FILES]
            if own:
                speeds = [row["images_per_second"] for row in own]
                axis.plot(sorted(speeds), [own[0]["top1"]] * len(own), color="0.8", linewidth=1, zorder=1)
                # Away from the marks of one that is nearly as accurate.
                near = [row["top1"] - own[0]["top1"] for row in rows if 0 < abs(row["top1"] - own[0]["top1"]) < 0.3]
                shift = (-9 if near[0] > 0 else 6) if near else 0
                axis.annotate(
                    name, (max(speeds), own[0]["top1"]), xytext=(9, shift), textcoords="offset points", va="center",
                    fontweight="bold" if model == result["model"] else "normal", fontsize=9,
                )  # fmt: skip
        axis.set_title(f"batch {batch}, {result['img_size']} x {result['img_size']}", fontsize=10)
        axis.set_xlabel("images/s")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.3)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("published ImageNet top-1, %")
    axes[0][0].margins(y=0.1)
    kinds = [
        plt.Line2D([], [], color=colour, marker=shape, linestyle="", label=label)
        for label, colour, shape in FILES.values()
    ]
    figure.legend(handles=kinds, loc="lower center", ncol=len(kinds), fontsize=9, frameon=False)
    figure.suptitle(f"{result['device']}, {result['threads']} threads", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(out, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    source, target = (
        Path(given)
        for given in sys.argv[1:3]
        or (ROOT / "benchmarks" / "results" / "deploy_d1.json", ROOT / "docs" / "deploy_d1.png")
    )
    draw(json.loads(source.read_text(encoding="utf-8")), target)
