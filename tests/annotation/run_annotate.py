"""Draw label maps as a process of its own that tests can kill: run_annotate.py CHECKPOINT DATA OUT [--slow SECONDS]."""

from __future__ import annotations

import sys
import time

from volo.annotation.drawing import AnnotateConfig, annotate, open_annotator
from volo.distributed import join_world


def main(annotator: str, data: str, out: str, slow: float = 0.0) -> None:
    config = AnnotateConfig(data=data, part="all", top=3, batch_size=4, shard_size=16, num_workers=0)

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "annotating":
            time.sleep(slow)

    with join_world("cpu") as world:
        annotate(open_annotator(annotator), config, out, world=world, resume=True, on_progress=on_progress)


if __name__ == "__main__":
    main(*sys.argv[1:4], *(float(word) for word in sys.argv[5:]))
