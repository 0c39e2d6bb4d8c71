"""Published weights and weight files: find, download, read, and load them with an exact report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import logging
import math
import os
import pickle
import re
import ssl
import struct
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from torch import Tensor

from volo.config import nearest
from volo.data.files import cache_folder
from volo.models.volo import VARIANTS, VOLO, VOLOConfig, resample_pos_embed

if TYPE_CHECKING:
    from volo.models.segmenter import Segmenter

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Source = Literal["hub", "release"]
OnProgress = Callable[[int, int | None], None]
"""Called with the bytes on disk and the size of the whole file, None where the server does not tell."""


# The published checkpoints


@dataclass(frozen=True)
class PretrainedWeights:
    """One published checkpoint; its scores are those of timm's evaluation on ImageNet-1k, in percent."""

    variant: str
    img_size: int
    release_file: str
    """Name among the files that the authors released."""
    crop_pct_original: float
    """Picture size / resized shorter side in the authors' evaluation; above 1 the crop reaches over the edge."""
    crop_pct_timm: float
    top1: float
    real: float
    """Accuracy on the reassessed labels of arXiv 2006.07159."""
    v2: float
    """Accuracy on ImageNet-V2, matched frequency."""

    @property
    def tag(self) -> str:
        return f"{self.variant}.{self.img_size}"

    @property
    def hub_repo(self) -> str:
        """The repository on the Hugging Face hub that holds the same weights as safetensors."""
        return f"timm/{self.variant}_{self.img_size}.sail_in1k"

    def url(self, source: Source = "release", base: str | None = None) -> str:
        """Where the file lies. `base`, or VOLO_HUB_URL or VOLO_RELEASES_URL in the environment, names a mirror."""
        if source == "hub":
            base = base or os.environ.get("VOLO_HUB_URL") or "https://huggingface.co"
            return f"{base.rstrip('/')}/{self.hub_repo}/resolve/main/model.safetensors"
        base = base or os.environ.get("VOLO_RELEASES_URL") or "https://github.com/sail-sg/volo/releases/download/volo_1"
        return f"{base.rstrip('/')}/{self.release_file}"


PRETRAINED: dict[str, PretrainedWeights] = {
    weights.tag: weights
    for weights in (
        # variant, img_size, release_file, crop_pct_original, crop_pct_timm, top1, real, v2
        PretrainedWeights("volo_d1", 224, "d1_224_84.2.pth.tar", 0.96, 0.96, 84.15, 88.90, 74.10),
        PretrainedWeights("volo_d1", 384, "d1_384_85.2.pth.tar", 0.96, 1.0, 85.26, 89.71, 75.69),
        PretrainedWeights("volo_d2", 224, "d2_224_85.2.pth.tar", 0.96, 0.96, 85.20, 89.33, 75.47),
        PretrainedWeights("volo_d2", 384, "d2_384_86.0.pth.tar", 0.96, 1.0, 86.05, 89.78, 76.24),
        PretrainedWeights("volo_d3", 224, "d3_224_85.4.pth.tar", 0.96, 0.96, 85.44, 89.59, 75.69),
        PretrainedWeights("volo_d3", 448, "d3_448_86.3.pth.tar", 0.96, 1.0, 86.51, 90.18, 77.19),
        PretrainedWeights("volo_d4", 224, "d4_224_85.7.pth.tar", 1.15, 0.96, 85.87, 89.80, 76.13),
        PretrainedWeights("volo_d4", 448, "d4_448_86.79.pth.tar", 1.15, 1.15, 86.79, 90.51, 77.75),
        PretrainedWeights("volo_d5", 224, "d5_224_86.10.pth.tar", 1.15, 0.96, 86.08, 89.88, 76.60),
        PretrainedWeights("volo_d5", 448, "d5_448_87.0.pth.tar", 1.15, 1.15, 86.97, 90.59, 77.91),
        PretrainedWeights("volo_d5", 512, "d5_512_87.07.pth.tar", 1.15, 1.15, 87.07, 90.63, 78.12),
    )
}


def list_pretrained(variant: str | None = None) -> list[str]:
    """Tags of the published weights, of one variant or of all."""
    return [tag for tag, weights in PRETRAINED.items() if variant in (None, weights.variant)]


def cached_path(tag: str, source: Source = "hub", cache_dir: str | Path | None = None) -> Path:
    """Where the file of a tag lies once downloaded, and where one fetched by other means may be put."""
    suffix = ".safetensors" if source == "hub" else ".pth.tar"
    return cache_folder(cache_dir) / f"{_known(tag).tag}{suffix}"


def fetch(tag: str, *, cache_dir: str | Path | None = None, **options: Any) -> Path:
    """The file of published weights: from the cache without touching the network, else from the hub, else the release.

    `options` go to `download`. Raises ValueError for an unknown tag, DownloadError if neither source delivers.
    """
    weights = _known(tag)
    sources: tuple[Source, ...] = ("hub", "release")
    for source in sources:
        if (path := cached_path(tag, source, cache_dir)).exists():
            return path
    problems = []
    for source in sources:
        path = cached_path(tag, source, cache_dir)
        try:
            return download(weights.url(source), cache_dir=cache_dir, name=path.name, **options)
        except DownloadError as error:
            problems.append(str(error))
            if source == "hub":
                logger.warning("%s\nTrying the authors' release file instead.", error)
    raise DownloadError("\n".join(problems))


def _known(tag: str) -> PretrainedWeights:
    if tag not in PRETRAINED:
        raise ValueError(
            f"{tag!r} is neither a published tag nor an existing file{nearest(tag, PRETRAINED)} (tags: {', '.join(PRETRAINED)})"
        )
    return PRETRAINED[tag]


# Downloading


class DownloadError(OSError):
    """A file could not be had; the message says why and where to put it by hand."""


class _Failed(Exception):
    """A download failed, and would fail again."""


class _BrokeOff(_Failed):
    """A download failed in a way that may pass."""


@dataclass(frozen=True)
class _Received:
    """What the server said about a file that arrived."""

    size: int | None
    sha256: str | None
    resumed: bool


def download(
    url: str,
    *,
    cache_dir: str | Path | None = None,
    name: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    progress: bool | OnProgress = True,
    timeout: float = 30.0,
    attempts: int = 3,
    backoff: float = 1.0,
) -> Path:
    """The local copy of `url`, downloaded unless it is in the cache already; then the network is not touched.

    What arrives is written to NAME.part and becomes NAME only when it is whole: of the size the server announced, and
    of the SHA-256 given or announced by the hub. An interrupted download goes on where it stopped if the file is still
    the same on the server, and starts anew otherwise. Processes that want the same file wait for the first.

    Args:
        url: http or https.
        cache_dir: folder for the file; None for $VOLO_CACHE or ~/.cache/volo.
        name: file name in that folder; None for the last part of `url` behind a digest of all of it.
        sha256: expected digest in hexadecimal.
        size: expected bytes; a cached file of another size is fetched again.
        progress: True for a bar on stderr if that is a terminal, False for none, or a function of (bytes, total).
        timeout: seconds without a single byte after which an attempt has failed.
        attempts: how often to try without getting any further.
        backoff: seconds before the second attempt, doubled for each one after it.

    Raises DownloadError for a server that does not deliver, a wrong size or a wrong digest (the file is removed).
    """
    folder = cache_folder(cache_dir)
    if name is None:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.split('?')[0].rstrip('/').rpartition('/')[2]}"
    path = folder / name
    if _is_cached(path, size):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path) as is_ours, _reporting(progress, name) as on_progress:
        if _is_cached(path, size):  # by the process that held the lock
            return path
        part = path.with_name(f"{name}.part" if is_ours else f"{name}.{os.getpid()}.part")
        try:
            _download_whole(url, part, sha256, size, on_progress, timeout, attempts, backoff)
            part.replace(path)
            _forget(part)
        except _Failed as error:
            later = "try again later" if isinstance(error, _BrokeOff) else "check the address and the mirror"
            raise DownloadError(
                f"could not download {url}: {error}. Please {later}, or fetch the file by other means and put it at {path}"
            ) from error
        finally:
            if not is_ours:
                _forget(part)
    return path


def _is_cached(path: Path, size: int | None) -> bool:
    return path.exists() and size in (None, path.stat().st_size)


def _download_whole(
    url: str,
    part: Path,
    sha256: str | None,
    size: int | None,
    on_progress: OnProgress,
    timeout: float,
    attempts: int,
    backoff: float,
) -> None:
    """Fill `part`, over as many connections as it takes, and check it."""
    failures, furthest = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            received = _receive(url, part, on_progress, timeout)
        except _BrokeOff as error:
            reached = part.stat().st_size if part.exists() else 0
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= attempts:
                raise
            logger.info("%s: %s; trying again", url, error)
            time.sleep(backoff * 2 ** (failures - 1))
            continue
        problem = _difference(part, size or received.size, sha256 or received.sha256)
        if not problem:
            return
        _forget(part)
        if not received.resumed:
            raise _Failed(f"it is not the file it should be and was removed: {problem}")
        logger.info("%s: %s; starting anew, as the earlier part may be damaged", url, problem)


def _difference(part: Path, size: int | None, sha256: str | None) -> str | None:
    """How the file differs from what it should be, or None."""
    if size not in (None, part.stat().st_size):
        return f"it has {part.stat().st_size:,} bytes instead of {size:,}"
    if sha256:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            return f"its SHA-256 is {digest} instead of {sha256.lower()}"
    return None


def _receive(url: str, part: Path, on_progress: OnProgress, timeout: float) -> _Received:
    """One connection: append what `part` lacks, or write it anew. Raises _Failed, or _BrokeOff if it ended too early."""
    identity = part.with_name(f"{part.name}.id")  # which state of the file on the server `part` is a piece of
    known = identity.read_text() if part.exists() and identity.exists() else None
    start = part.stat().st_size if known else 0
    request = urllib.request.Request(url, headers={"User-Agent": "volo", "Accept-Encoding": "identity"})
    if known and start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", known)
    redirects = _HubHeaders()
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=timeout) as response:
            headers = response.headers
            resumed = response.status == 206
            if not resumed:
                start = 0
                _forget(part)
                if current := _identity(headers):
                    identity.write_text(current)
            elif _identity(headers) != known or not headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                _forget(part)
                raise _BrokeOff("the file has changed on the server since the download began")
            length = headers.get("Content-Length")
            total = start + int(length) if length else None
            with part.open("ab") as file:
                _copy(response, file, start, total, on_progress)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # `part` does not end before the file does: it is a piece of something else
            _forget(part)
        passes = error.code >= 500 or error.code in (408, 416, 429)
        raise (_BrokeOff if passes else _Failed)(f"the server says {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _BrokeOff(str(getattr(error, "reason", None) or error)) from error
    except OSError as error:  # a full disk
        raise _Failed(f"{error} while writing {part}") from error
    if total is not None and (arrived := part.stat().st_size) < total:
        raise _BrokeOff(f"the connection broke off after {arrived:,} of {total:,} bytes")
    linked_size = headers.get("X-Linked-Size") or redirects.size
    return _Received(int(linked_size) if linked_size else total, _sha256(headers) or redirects.sha256, resumed)


def _copy(source: BinaryIO, file: BinaryIO, done: int, total: int | None, on_progress: OnProgress) -> None:
    on_progress(done, total)
    try:
        while chunk := source.read(1 << 18):
            file.write(chunk)
            done += len(chunk)
            on_progress(done, total)
    finally:
        file.flush()
        os.fsync(file.fileno())


class _HubHeaders(urllib.request.HTTPRedirectHandler):
    """The hub redirects to a store and tells size and digest of the file only in the redirecting answer."""

    def __init__(self) -> None:
        self.sha256: str | None = None
        self.size: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        self.sha256 = self.sha256 or _sha256(headers)
        self.size = self.size or headers.get("X-Linked-Size")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _sha256(headers: Mapping[str, str]) -> str | None:
    """The digest of a large file on the hub; its small files carry a git digest there, which has 40 digits."""
    tag = headers.get("X-Linked-Etag", "").strip('"')
    return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


def _identity(headers: Mapping[str, str]) -> str | None:
    """What If-Range takes: a strong ETag, or the time of the last change."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.id").unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock for the file; False where locks cannot be had. The system frees the locks of a killed process."""
    if fcntl is None:
        yield False
        return
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is downloading %s: waiting for it", path.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems know no locks
            yield False
            return
        yield True


@contextlib.contextmanager
def _reporting(progress: bool | OnProgress, label: str) -> Iterator[OnProgress]:
    if callable(progress):
        yield progress
    elif not progress or not sys.stderr.isatty():
        yield lambda done, total: None
    else:
        from rich import progress as rich_progress
        from rich.console import Console

        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


# Reading


_WHAT_TORCH_RAISES_FOR_DAMAGED_FILES = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error
)  # fmt: skip


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers in a weight file, on the CPU.

    Takes safetensors files and torch files: a plain state dict, the original's and timm's checkpoints (`state_dict_ema`
    before `state_dict`) and our own (`ema` before `model`). Prefixes of DDP and torch.compile are taken off.

    Raises ValueError for a file that is damaged, no weight file, or a pickle that would run code when loaded.
    """
    return _state_dict_in(_read(path), str(path))


def _read(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file at {path}")
    damaged = f"{path} ({path.stat().st_size:,} bytes) is damaged, cut off, or no weight file at all; delete it and fetch it again"
    if is_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{damaged}: {error}") from error
    try:
        return load_plain(path)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is refused: besides tensors it holds {found[1]}, and loading such objects can run code. "
                "If you trust the file, save its state dict anew with the software it comes from"
            ) from error
        raise ValueError(damaged) from error
    except _WHAT_TORCH_RAISES_FOR_DAMAGED_FILES as error:
        raise ValueError(f"{damaged}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def is_safetensors(path: Path) -> bool:
    """By the ending, or the content: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def load_plain(path: Path) -> Any:
    """`torch.load` onto the CPU, of plain data alone; it raises what torch raises."""
    # The original's training script, like timm's, stores its arguments beside the weights: a plain record.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict_in(content: Any, origin: str) -> dict[str, Tensor]:
    wrappers = ("ema", "state_dict_ema", "state_dict", "model")
    while isinstance(content, Mapping):
        inner = next((content[key] for key in wrappers if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        kind = f"keys {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"{origin} holds no state dict (name -> tensor), neither plain nor under {', '.join(wrappers)}; found: {kind}"
        )
    for _ in range(2):  # DDP around a compiled model, or a compiled model around DDP
        for prefix in ("module.", "_orig_mod."):
            if all(name.startswith(prefix) for name in content):
                content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return dict(content)


# Loading


@dataclass(frozen=True)
class LoadReport:
    """What loading found. Names under `missing` and `misshaped` keep the values the model had."""

    missing: tuple[str, ...] = ()
    """Names the model has and the file has not."""
    unexpected: tuple[str, ...] = ()
    """Names the file has and the model has not."""
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """(name, shape in the file, shape in the model)."""
    adapted: tuple[str, ...] = ()
    """What was changed because it was asked for, in words."""

    @property
    def is_exact(self) -> bool:
        """Every tensor of the file went into the model, and every one of the model came from the file."""
        return not (self.missing or self.unexpected or self.misshaped or self.adapted)

    def __str__(self) -> str:
        lines = [f"missing in the file: {name}" for name in self.missing]
        lines += [f"unexpected in the file: {name}" for name in self.unexpected]
        lines += [
            f"other shape: {name} is {_shape(given)} in the file, {_shape(wanted)} in the model"
            for name, given, wanted in self.misshaped
        ]
        lines += [f"adapted: {what}" for what in self.adapted]
        return "\n".join(lines) or "every name and shape agrees"


def load_weights(
    model: VOLO,
    source: str | Path | Mapping[str, Tensor],
    *,
    adapt_pos_embed: bool = False,
    adapt_head: bool = False,
    adapt_stem: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Load weights into `model`, in place.

    Args:
        model: the model to load into; unchanged if this function raises.
        source: a weight file, as `read_state_dict` takes it, or a state dict.
        adapt_pos_embed: resample a position embedding [1, h, w, C] made for another picture size.
        adapt_head: leave `head` and `aux_head` as they are in the model where their class count differs.
        adapt_stem: sum (for one channel) or repeat the RGB filters of the first convolution for other `in_chans`.
        strict: raise ValueError, with the report, for names or shapes that differ; else load what fits.

    Raises ValueError if strict and something does not fit, or for a file that `read_state_dict` refuses.
    """
    given = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    wanted = model.state_dict()
    adapted: list[str] = []
    kept_heads: set[str] = set()

    def differs(name: str) -> bool:
        return name in given and name in wanted and given[name].shape != wanted[name].shape

    if adapt_pos_embed and differs("pos_embed"):
        old, new = given["pos_embed"].shape, wanted["pos_embed"].shape
        if len(old) == 4 and old[-1] == new[-1]:
            given["pos_embed"] = resample_pos_embed(given["pos_embed"], (new[1], new[2]))
            adapted.append(f"pos_embed resampled from {_shape(old[1:3])} to {_shape(new[1:3])} tokens")
    if adapt_head:
        for head in ("head.", "aux_head."):
            ours = {name: tensor.shape for name, tensor in wanted.items() if name.startswith(head)}
            theirs = {name: tensor.shape for name, tensor in given.items() if name.startswith(head)}
            if ours != theirs:
                kept_heads |= ours.keys()
                given = {name: tensor for name, tensor in given.items() if name not in theirs}
                num_theirs, num_ours = (next((s[0] for s in shapes.values()), 0) for shapes in (theirs, ours))
                fate = "left as initialised" if ours else "left out"
                adapted.append(f"{head[:-1]} {fate} ({num_theirs} classes in the file, {num_ours} in the model)")
    stem = "patch_embed.conv.0.weight"
    if adapt_stem and differs(stem) and given[stem].shape[1] == 3:
        in_chans = wanted[stem].shape[1]
        given[stem] = _stem_for(given[stem], in_chans)
        adapted.append(f"{stem} turned from 3 input channels to {in_chans}")

    misshaped = [name for name in wanted if differs(name)]
    report = LoadReport(
        missing=tuple(name for name in wanted if name not in given and name not in kept_heads),
        unexpected=tuple(name for name in given if name not in wanted),
        misshaped=tuple((name, tuple(given[name].shape), tuple(wanted[name].shape)) for name in misshaped),
        adapted=tuple(adapted),
    )
    if strict and (report.missing or report.unexpected or report.misshaped):
        raise ValueError(f"the weights do not fit the model, which was left unchanged:\n{report}{_hints(report)}")
    fitting = {name: tensor for name, tensor in given.items() if name in wanted and not differs(name)}
    model.load_state_dict(fitting, strict=False)
    return report


def _stem_for(weight: Tensor, in_chans: int) -> Tensor:
    """Filters [C, 3, k, k] for another number of channels, of the same response to a grey picture (as in timm)."""
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans] * (3 / in_chans)


def _hints(report: LoadReport) -> str:
    concerned = {*report.missing, *report.unexpected, *(name for name, _, _ in report.misshaped)}
    hints = {
        "adapt_pos_embed": "pos_embed" in concerned,
        "adapt_head": any(name.startswith(("head.", "aux_head.")) for name in concerned),
        "adapt_stem": "patch_embed.conv.0.weight" in concerned,
    }
    asked = [f"{name}=True" for name, concerns in hints.items() if concerns]
    return f"\nTo adapt what can be adapted pass {', '.join(asked)}" if asked else ""


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


# Building a model with its weights

# What the weights of a model depend on; the rest of a VOLOConfig is free, or adapted.
_ARCHITECTURE = (
    "depths", "embed_dims", "num_heads", "mlp_ratios", "stem_dim", "stem_stride", "patch_size", "outlook_kernel",
    "outlook_stride", "window_padding", "num_class_blocks", "qkv_bias", "norm_eps",
)  # fmt: skip


def create_pretrained(name: str, pretrained: bool | str | Path, overrides: Mapping[str, Any]) -> VOLO:
    """The model `name` with weights; `volo.create_model(name, pretrained, **overrides)` calls this.

    Picture size, classes and input channels are those of the weights. Overrides of `img_size`, `num_classes` and
    `in_chans` adapt position embedding, heads and stem to them.

    Args:
        name: a key of `VARIANTS`.
        pretrained: True for the published weights at `img_size`, or at 224 where none are published at that size; a
            tag of `list_pretrained(name)`; or the path of a weight file, one of our checkpoints for instance.
        overrides: fields of `VOLOConfig`.

    Raises ValueError for weights of another model or an unknown tag, DownloadError if they cannot be had.
    """
    path, origin = _locate(name, pretrained, overrides)
    content = _read(path)
    state_dict = _state_dict_in(content, origin)
    asked = dataclasses.replace(VARIANTS[name], **overrides)
    stored = content.get("model_config") if isinstance(content, Mapping) else None
    if isinstance(stored, Mapping):
        try:
            own = VOLOConfig(**stored)
        except TypeError as error:
            raise ValueError(f"{origin} was written by another version of volo: {error}") from error
        pairs = {field: (getattr(own, field), getattr(asked, field)) for field in _ARCHITECTURE}
        if differing := [f"{field} is {its}, not {ours}" for field, (its, ours) in pairs.items() if its != ours]:
            raise ValueError(f"{origin} holds another model than {name}: its {', its '.join(differing)}")
    else:
        own = dataclasses.replace(asked, **_sizes_in(state_dict, asked))
    model = VOLO(dataclasses.replace(own, **overrides))
    report = load_weights(
        model,
        state_dict,
        adapt_pos_embed="img_size" in overrides,
        adapt_head="num_classes" in overrides,
        adapt_stem="in_chans" in overrides,
    )
    logger.info("%s from %s: %s", name, origin, report)
    return model


def create_from_file(path: str | Path) -> tuple[str, VOLO]:
    """The model whose weights lie in a file that does not say so (the original's, timm's, a plain state dict), and its name.

    It is the one of `VARIANTS`, with its own options, that has the file's names and shapes. Picture size, classes and
    input channels are those of the weights. Raises ValueError where there is none, or as `read_state_dict`.
    """
    state_dict = read_state_dict(path)
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    for name, variant in VARIANTS.items():
        with torch.device("meta"):  # the weights follow; drawing random ones would only take time
            model = VOLO(dataclasses.replace(variant, **_sizes_in(state_dict, variant)))
        if {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes:
            model.load_state_dict(state_dict, assign=True)
            return name, model.float()
    raise ValueError(
        f"{path} holds {len(shapes)} tensors ({', '.join(list(shapes)[:3])}, ...), which by names and shapes are none of "
        f"{', '.join(VARIANTS)} with their own options. Other models are known by the checkpoints of `volo train`; in "
        "Python, volo.create_model(name, pretrained=path, **options) loads them"
    )


def is_segmenter_file(pretrained: str | Path) -> bool:
    """Whether `pretrained` names a file of ours that holds a segmentation model; nothing is downloaded to find out."""
    if str(pretrained) in PRETRAINED or not Path(pretrained).is_file():
        return False
    content = _read(pretrained)
    config = content.get("model_config") if isinstance(content, Mapping) else None
    return isinstance(config, Mapping) and "backbone" in config


def load_segmenter_weights(model: Segmenter, source: str | Path) -> LoadReport:
    """Load a segmentation checkpoint of ours into `model`, in place.

    The position embedding is resampled, and classifiers for another number of classes are left as they are in the
    model. Raises ValueError, with the report, if anything else differs; `model` is then unchanged.
    """
    given, wanted = read_state_dict(source), model.state_dict()
    adapted, kept = [], set()
    pos_embed = "backbone.pos_embed"
    if pos_embed in given and given[pos_embed].shape != wanted[pos_embed].shape:
        old, new = given[pos_embed].shape, wanted[pos_embed].shape
        if len(old) == 4 and old[-1] == new[-1]:
            given[pos_embed] = resample_pos_embed(given[pos_embed], (new[1], new[2]))
            adapted.append(f"{pos_embed} resampled from {_shape(old[1:3])} to {_shape(new[1:3])} tokens")
    for head in ("decode_head.conv_seg.", "auxiliary_head.conv_seg."):
        names = [name for name in wanted if name.startswith(head)]
        theirs = {name: given[name].shape for name in names if name in given}
        if theirs and any(shape[0] != model.num_classes for shape in theirs.values()):
            kept |= set(names)
            given = {name: tensor for name, tensor in given.items() if not name.startswith(head)}
            num_theirs = next(iter(theirs.values()))[0]
            adapted.append(
                f"{head[:-1]} left as initialised ({num_theirs} classes in the file, {model.num_classes} in the model)"
            )
    misshaped = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    report = LoadReport(
        missing=tuple(name for name in wanted if name not in given and name not in kept),
        unexpected=tuple(name for name in given if name not in wanted),
        misshaped=tuple((name, tuple(given[name].shape), tuple(wanted[name].shape)) for name in misshaped),
        adapted=tuple(adapted),
    )
    if report.missing or report.unexpected or report.misshaped:
        raise ValueError(f"the weights in {source} do not fit the model, which was left unchanged:\n{report}")
    model.load_state_dict(given, strict=False)
    return report


def _locate(name: str, pretrained: bool | str | Path, overrides: Mapping[str, Any]) -> tuple[Path, str]:
    """The weight file, and what to call it."""
    tags = list_pretrained(name)
    if pretrained is True:
        if not tags:
            variants = sorted({weights.variant for weights in PRETRAINED.values()})
            raise ValueError(
                f"no weights of {name} are published, only of {', '.join(variants)}; give pretrained the path of a checkpoint"
            )
        size = dataclasses.replace(VARIANTS[name], **overrides).img_size
        tag = f"{name}.{size[0]}" if size[0] == size[1] and f"{name}.{size[0]}" in tags else f"{name}.224"
        return fetch(tag), tag
    given = str(pretrained)
    if given not in PRETRAINED and Path(given).is_file():
        return Path(given), given
    weights = _known(given)
    if weights.variant != name:
        raise ValueError(
            f"{weights.tag} are weights of {weights.variant}, not of {name}{nearest(weights.tag, tags)} "
            f"(tags of {name}: {', '.join(tags) or 'none'})"
        )
    return fetch(weights.tag), weights.tag


def _sizes_in(state_dict: Mapping[str, Tensor], config: VOLOConfig) -> dict[str, Any]:
    """The fields of the configuration that the shapes of the weights tell."""
    sizes: dict[str, Any] = {"num_classes": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0}
    if (pos_embed := state_dict.get("pos_embed")) is not None and pos_embed.dim() == 4:
        sizes["img_size"] = tuple(n * config.size_multiple for n in pos_embed.shape[1:3])
    if (stem := state_dict.get("patch_embed.conv.0.weight")) is not None and stem.dim() == 4:
        sizes["in_chans"] = stem.shape[1]
    return sizes
