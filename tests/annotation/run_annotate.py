"""Generate label maps as a process of its own that tests can kill: run_annotate.py CHECKPOINT DATA OUT [--slow SECONDS]."""

from __future__ import annotations

import sys
import time

from volo.annotation.annotator import load_annotator
from volo.annotation.generate import annotate
from volo.config import AnnotatorConfig, DataConfig
from volo.distributed import join_world


def main(annotator: str, data: str, out: str, slow: float = 0.0) -> None:
    how, where = AnnotatorConfig(model=annotator, top=3, batch_size=4), DataConfig(path=data, num_workers=0)

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "annotating":
            time.sleep(slow)

    with join_world("cpu") as world:
        options = {"part": "all", "shard_size": 16, "resume": True, "on_progress": on_progress}
        annotate(load_annotator(how), how, where, out, world=world, **options)


if __name__ == "__main__":
    main(*sys.argv[1:4], *(float(word) for word in sys.argv[5:]))
