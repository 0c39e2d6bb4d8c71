"""Published weights: which there are, and how files come from the Hugging Face hub or the authors' release."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volo.config import nearest
from volo.data.files import cache_folder
from volo.models.loading import read_file

logger = logging.getLogger(__name__)

Source = Literal["hub", "release"]

HUB_PREFIX = "hf-hub:"
"""What a repository of the hub is called by: hf-hub:user/name, or hf-hub:user/name@revision."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""What models on the hub consist of."""


class DownloadError(OSError):
    """A file could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class PretrainedWeights:
    """One published checkpoint; its scores are those of timm's evaluation on ImageNet-1k, in percent."""

    variant: str
    img_size: int
    release_file: str
    """Name among the files that the authors released."""
    crop_pct_original: float
    """Image size / resized shorter side in the authors' evaluation; above 1 the crop reaches over the edge."""
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

    @property
    def release_url(self) -> str:
        """Where the authors' file lies; VOLO_RELEASES_URL in the environment names a mirror."""
        base = os.environ.get("VOLO_RELEASES_URL") or "https://github.com/sail-sg/volo/releases/download/volo_1"
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


OWN = {
    "volo_nano": "8e0a6318695ff7f73b8aa6e60bb0d5012acd2a5e3b27ed25d3cca55855395597",
    "volo_tiny": "77970147ae1e3884645c2885222b8c438407dbbf4c9e6d1cebb44ff5ce603e7b",
}
"""SHA-256 of NAME.safetensors, the weights that we trained ourselves for the model of that name. Those of volo_nano come with
the package, those of volo_tiny lie in the repository. They say themselves what they are; docs/models has a card for each."""
SHIPPED_FOLDER = Path(__file__).resolve().parents[1] / "weights"
CHECKOUT_FOLDER = Path(__file__).resolve().parents[3] / "weights"


def find_own(name: str) -> Path | None:
    """The file of our own weights for a model of that name if it is on this machine: in the package, in a checkout of the
    repository around it, or in $VOLO_CACHE. None: it is not, or there are none."""
    if name not in OWN:
        return None
    folders = [SHIPPED_FOLDER, CHECKOUT_FOLDER]
    with contextlib.suppress(ValueError):  # no home directory, hence no cache
        folders.append(cache_folder())
    return next((path for folder in folders if (path := folder / f"{name}.safetensors").is_file()), None)


def list_pretrained(variant: str | None = None) -> list[str]:
    """Names of weights, of one variant or of all: tags of the published ones, and models that have weights of our own."""
    published = [tag for tag, weights in PRETRAINED.items() if variant in (None, weights.variant)]
    return published + [name for name in OWN if variant in (None, name)]


def known_tag(tag: str) -> PretrainedWeights:
    if tag not in PRETRAINED:
        raise ValueError(
            f"{tag!r} is neither a published tag nor an existing file{nearest(tag, PRETRAINED)} (tags: {', '.join(PRETRAINED)})"
        )
    return PRETRAINED[tag]


def cached_path(tag: str, source: Source = "hub") -> Path:
    """Where the file of a tag may be put by hand; the release's is kept there when it is fetched. Our own lie where
    `find_own` finds them."""
    if tag in OWN:
        return find_own(tag) or cache_folder() / f"{tag}.safetensors"
    suffix = ".safetensors" if source == "hub" else ".pth.tar"
    return cache_folder() / f"{known_tag(tag).tag}{suffix}"


def find(tag: str) -> Path | None:
    """The file of a tag if it is on this machine: come with the package, put there by hand, fetched by us, or by timm; the
    network is not used."""
    if tag in OWN:
        return find_own(tag)
    weights = known_tag(tag)
    by_hand: tuple[Source, ...] = ("hub", "release")
    for source in by_hand:
        try:
            path = cached_path(tag, source)
        except ValueError:  # no home directory, hence no folder
            break
        if path.exists():
            return path
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    path_or_sign = try_to_load_from_cache(weights.hub_repo, WEIGHTS)
    return Path(path_or_sign) if isinstance(path_or_sign, str) else None


def fetch(tag: str) -> Path:
    """The file of published weights: what is on this machine, else from the hub, else from the authors' release; of our own
    weights, from where VOLO_WEIGHTS_URL says.

    Raises ValueError for an unknown tag, DownloadError if neither source delivers.
    """
    if (found := find(tag)) is not None:
        return found
    if tag in OWN:
        return _fetch_own(tag)
    weights = known_tag(tag)
    try:
        return _checked(fetch_from_hub(weights.hub_repo, WEIGHTS))
    except DownloadError as error:
        from_hub = str(error)
        logger.warning("%s\nTrying the authors' release file instead.", error)
    try:
        return _fetch_release(weights)
    except DownloadError as error:
        raise DownloadError(
            f"{tag} cannot be downloaded here; obtain the file another way, and give its path in place of {tag}:\n{from_hub}\n{error}"
        ) from error


def fetch_from_hub(repository: str, file: str, revision: str | None = None) -> Path:
    """A file of a repository ("user/name") on the hub, from the hub's own cache if it is there and still the same.

    HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and proxies work as for every user of `huggingface_hub`.
    Raises DownloadError, with what to do.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise DownloadError(
            "weights of the hub need the package huggingface_hub: pip install huggingface_hub"
        ) from error
    # The hub's own error derives from that of the HTTP library, which is not the same for all versions.
    known: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
    what = f"could not fetch {file} of {repository} from {constants.ENDPOINT}"
    if str(constants.HF_HUB_CACHE).startswith("~"):
        raise DownloadError(f"{what}: no home directory is known; set HF_HOME to a folder that can be written, or HOME")
    # The base is that of whichever HTTP library the installed version uses.
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except PermissionError as error:
        raise DownloadError(f"{what}: {error}; set HF_HOME to a folder that can be written") from error
    except known as error:
        raise DownloadError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _checked(path: Path) -> Path:
    """`path` of the hub's cache, whose large files are named by the SHA-256 that the hub announced, if it is right."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) is None:
        return path
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == blob.name:
        return path
    path.unlink()
    blob.unlink()
    raise DownloadError(
        f"{path} is not what the hub announced and was removed: its SHA-256 is {digest}, not {blob.name}"
    )


def _fetch_own(name: str) -> Path:
    """Our weights, into our cache, once their SHA-256 is right."""
    base = os.environ.get("VOLO_WEIGHTS_URL")
    file = f"{name}.safetensors"
    if not base:
        raise DownloadError(
            f"the weights of {name} are not on this machine: they lie in weights/ of the repository. Put {file} into $VOLO_CACHE, "
            f"or let VOLO_WEIGHTS_URL say where to download it from (the address before /{file})"
        )

    def check(part: Path) -> None:
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != OWN[name]:
            raise ValueError(f"it is another file: its SHA-256 is {digest}, not {OWN[name]}")

    return _download(f"{base.rstrip('/')}/{file}", cached_path(name), check)


def _fetch_release(weights: PretrainedWeights) -> Path:
    """The authors' file, in our own cache; only whole weight files get there."""

    def check(part: Path) -> None:
        read_file(part)  # the release announces no hashes; what was cut off, or is a page of a proxy, does not open

    try:
        path = cached_path(weights.tag, "release")
    except ValueError as error:  # no home directory
        raise DownloadError(f"could not download {weights.release_url}: {error}") from error
    return _download(weights.release_url, path, check)


def _download(url: str, path: Path, check: Callable[[Path], None]) -> Path:
    """`url` as the file `path`, which appears when `check` has raised no ValueError. Raises DownloadError."""
    import torch

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError(f"did not try {url}: HF_HUB_OFFLINE is set")
    try:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            check(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except PermissionError as error:
        raise DownloadError(f"could not keep {url}: {error}; set VOLO_CACHE to a folder that can be written") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DownloadError(f"could not download {url}: {error}") from error
    return path
