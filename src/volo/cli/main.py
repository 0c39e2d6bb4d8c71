"""`volo train | evaluate | predict | embed | segment | annotate | export | info | pack | bench`: the table of commands, and what errors become.

A command is a file here with `main(argv)`, loaded when it is asked for; everything beyond the standard library and the
parser is imported where it is used, so that help and spelling mistakes are answered at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from volo import __version__
from volo.config import expand_path, nearest

COMMANDS = {
    "train": ("RECIPE", "train on a folder of images, CIFAR, the digits that come along, or images with masks"),
    "evaluate": ("MODEL", "how good a model is: top-1, top-5, every class, calibration, confusion; mIoU, boundaries"),
    "predict": ("MODEL ...", "name what is in images"),
    "embed": ("MODEL ...", "images as vectors; near-duplicates and wrong labels of a data set"),
    "segment": ("MODEL ...", "classify every pixel of images: masks, overlays, areas"),
    "annotate": ("MODEL", "generate label maps for token labeling, with any classifier of ours or timm's; check them"),
    "export": ("MODEL", "a file for other runtimes: ONNX, OpenVINO, torch.export; checked before it is there"),
    "info": ("", "versions, devices, backends of the operator; --models lists models, weights and recipes"),
    "pack": ("DATA", "turn images into tar shards, for large sets and slow disks"),
    "bench": ("WHAT", "measure: the operator, a model, a training step, the training loop, the input pipeline"),
}

HELP = f"""volo {__version__}: Vision Outlooker, image recognition with outlook attention (arXiv 2106.13112)

{"".join(f"  {f'volo {name} {what}':22} {does}" + chr(10) for name, (what, does) in COMMANDS.items())}
MODEL is a run folder, a checkpoint in it, an exported file, published weights such as volo_d1.224, or a file of the original's
or timm's.

Begin with:
  volo train photos --data FOLDER                       FOLDER/CLASS/*.jpg, or FOLDER/train and FOLDER/val; five minutes
  volo predict runs/photos new_pictures/
  volo export runs/photos                               photos.onnx
  volo COMMAND --help                                   every option, with examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv if None) and return its exit code: 0; 1: some images could not be read, or nobody reads
    our output; 2: an error that the message explains; 130: Ctrl-C; 143: SIGTERM.
    """
    from volo.cli.console import complain, is_main_process

    share_cores()
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StderrHandler()])
    # What was done otherwise than one may think, such as heads left as initialised, is told; by one process of a run.
    logging.getLogger("volo").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    # Names of files are bytes, of any encoding or none; a terminal that cannot show one is no reason to stop.
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(HELP, end="", flush=True)
            return 0 if argv else 2
        if argv[0] in ("-V", "--version"):
            print(f"volo {__version__}", flush=True)
            return 0
        if argv[0] not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise ValueError(f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)} (commands: {known}; see volo --help)")
        command = importlib.import_module(f"volo.cli.{argv[0]}")
        code = command.main([_expanded(word) for word in argv[1:]])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        complain("stopped" + (f"; go on with: {interrupt}" if str(interrupt) else ""))
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _give_up_output()  # its reader (head, less) has gone
        return 1
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("VOLO_TRACEBACK"):
            raise
        complain(_message(error))
        _give_up_output()
        return 2
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError) or os.environ.get("VOLO_TRACEBACK"):
            raise
        complain(
            f"{str(error).splitlines()[0]}\nUse a smaller --batch-size (training: --train.batch_size, or the same with "
            "--train.accumulation 4), --amp bf16 (--train.amp bf16), a smaller image, or --train.grad_checkpointing true"
        )
        return 2


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of the environment that say how the threads of OpenMP wait for each other."""


def share_cores() -> None:
    """Let OpenMP's threads spin only briefly while they wait, unless the environment says how they wait (`WAITING`).

    By default they spin long, and where another process takes one of the cores, each parallel loop waits until the scheduler
    lets the last thread continue: training falls to a third of its speed, with larger steps to a twentieth. Threads that sleep
    at once (OMP_WAIT_POLICY=PASSIVE) cost a tenth of the speed on an idle machine; this count costs next to nothing there
    and keeps half of the speed beside another process (benchmarks/busy_machine.py). OpenMP reads it when it is loaded, which
    is with torch.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "1500"


def _give_up_output() -> None:
    """What standard output does not take must not make Python stumble again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _expanded(word: str) -> str:
    """A word with ~ and $HOME for the home folder, after --option= too, where shells leave them alone."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + expand_path(value)


class _StderrHandler(logging.Handler):
    """Writes to what is sys.stderr at that moment: while a bar is drawn, rich puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(self.format(record), file=sys.stderr)


def _message(error: Exception) -> str:
    """What an error says, without Python's decoration of OSErrors, and what was added to it on its way."""
    if isinstance(error, UnicodeEncodeError):
        # A name in bytes that are not UTF-8, as Python has it, was to be written into a text file.
        around = (
            re.split(r'["\n\t]', error.object[: error.start])[-1] + re.split(r'["\n\t]', error.object[error.start :])[0]
        )
        shown = around.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return (
            f"{shown} is not UTF-8, and the text file that it has to be written into would be none either. Rename it "
            "(for a whole folder: convmv -r -f latin1 -t utf8 --notest FOLDER), or go by a link with a plain name"
        )
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return "\n".join([said, *getattr(error, "__notes__", ())])
