"""Write images that a run has not been trained on as PNG files, one folder a class: something to try `volo predict` on.

python examples/held_out_pictures.py runs/digits runs/digits/held_out --count 28
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.io import write_png

from volo.config import load_recipe
from volo.data.images import open_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("folder", type=Path, help="where the images go")
    parser.add_argument("--count", type=int, default=28, help="so many, evenly spread over the held-out images")
    args = parser.parse_args()

    source = open_data(load_recipe(args.run / "recipe.toml").data).val
    count = min(args.count, len(source))
    for i in range(count):
        index = i * len(source) // count
        name = source.names[index].replace("/", "_").partition(".")[0] + ".png"
        path = args.folder / source.classes[int(source.targets[index])] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(source.load(index), str(path))
    print(f"{count} held-out images in {args.folder}")


if __name__ == "__main__":
    main()
