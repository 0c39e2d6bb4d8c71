"""Weights: downloads against a real server on the loopback, files in every layout, exact reports."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import volo
from volo.models.volo import VARIANTS, VOLO, VOLOConfig, resample_pos_embed
from volo.models.weights import (
    PRETRAINED,
    DownloadError,
    cached_path,
    download,
    fetch,
    list_pretrained,
    load_weights,
    read_state_dict,
)

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(DATA).hexdigest()


@dataclass
class FileServer:
    """What the server offers, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    supports_range: bool = True
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers instead of the file."""
    stall: float = 0.0
    """Seconds to wait before the answer."""
    pause: float = 0.0
    """Seconds between pieces of 16 KiB."""
    announces_length: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range header)"""
    address: str = ""

    def url(self, path: str) -> str:
        return self.address + path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    state: FileServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        state, path, wanted = self.state, self.path, self.headers.get("Range")
        state.requests.append((path, wanted))
        time.sleep(state.stall)
        extra = state.headers.get(path, {})
        if state.statuses or path not in state.files | state.redirects:
            self._head(state.statuses.pop(0) if state.statuses else 404, {})
            return
        if path in state.redirects:
            self._head(302, {"Location": state.redirects[path], **extra})
            return
        data = state.files[path]
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if wanted and state.supports_range and self.headers.get("If-Range", etag) == etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(data):
                self._head(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            body = data[start:]
            status, about = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        else:
            body, status, about = data, 200, {}
        if state.announces_length:
            about["Content-Length"] = str(len(body))
        self._head(status, {"ETag": etag, **about, **extra})
        body = body[: state.cuts.pop(0)] if state.cuts else body
        for start in range(0, len(body), 1 << 14):
            self.wfile.write(body[start : start + (1 << 14)])
            time.sleep(state.pause)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, killed for instance, is no news."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = FileServer(files={"/w.bin": DATA})
    http = QuietServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    state.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VOLO_CACHE", str(folder))
    return folder


def get(server: FileServer, path: str = "/w.bin", **options) -> Path:
    return download(server.url(path), **{"name": "w.bin", "progress": False, "backoff": 0.01, **options})


def left_over(cache: Path) -> set[str]:
    return {p.name for p in cache.iterdir() if not p.name.endswith(".lock")}


# Downloading


def test_download_and_then_offline(server: FileServer, cache: Path) -> None:
    path = get(server, sha256=SHA256, size=len(DATA))
    assert path == cache / "w.bin"
    assert path.read_bytes() == DATA
    assert left_over(cache) == {"w.bin"}
    assert get(server, sha256=SHA256, size=len(DATA)) == path
    assert len(server.requests) == 1


def test_cache_dir_argument_and_name_from_the_url(server: FileServer, cache: Path, tmp_path: Path) -> None:
    server.files["/other/w.bin"] = b"other"
    a = download(server.url("/w.bin"), cache_dir=tmp_path / "mine", progress=False)
    b = download(server.url("/other/w.bin"), cache_dir=tmp_path / "mine", progress=False)
    assert a.parent == b.parent == tmp_path / "mine"
    assert a.name.endswith("-w.bin")
    assert b.name.endswith("-w.bin")
    assert (a.read_bytes(), b.read_bytes()) == (DATA, b"other")  # equal names of two addresses do not collide
    assert not cache.exists()


def test_a_server_that_dies_midway_is_resumed(server: FileServer, cache: Path) -> None:
    server.cuts = [300_000, 200_000]
    seen: list[tuple[int, int | None]] = []
    path = get(server, sha256=SHA256, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == DATA
    assert [r for _, r in server.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert seen[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {len(DATA)}


def test_a_server_that_truncates_for_ever(server: FileServer, cache: Path) -> None:
    server.supports_range = False
    server.cuts = [100_000] * 10
    with pytest.raises(DownloadError, match=r"broke off after 100,000 of 1,048,576 bytes.*put it at .*w\.bin"):
        get(server)
    assert len(server.requests) == 3
    assert not (cache / "w.bin").exists()
    server.cuts = []
    assert get(server).read_bytes() == DATA  # starts anew


def test_restarts_when_the_file_changed_meanwhile(server: FileServer, cache: Path) -> None:
    server.cuts = [300_000]
    with pytest.raises(DownloadError, match="broke off"):
        get(server, attempts=1)
    assert left_over(cache) == {"w.bin.part", "w.bin.part.id"}
    server.files["/w.bin"] = DATA[::-1]
    assert get(server).read_bytes() == DATA[::-1]


def test_never_joins_pieces_of_two_files_when_the_server_ignores_if_range(server: FileServer, cache: Path) -> None:
    server.cuts = [300_000]
    with pytest.raises(DownloadError):
        get(server, attempts=1)
    server.headers["/w.bin"] = {"ETag": '"another"'}
    assert get(server).read_bytes() == DATA
    assert [r for _, r in server.requests] == [None, "bytes=300000-", None]


def test_a_part_longer_than_the_file_is_thrown_away(server: FileServer, cache: Path) -> None:
    cache.mkdir()
    (cache / "w.bin.part").write_bytes(DATA + b"!")
    (cache / "w.bin.part.id").write_text(f'"{hashlib.md5(DATA).hexdigest()}"')
    assert get(server).read_bytes() == DATA


def test_a_damaged_part_is_found_by_its_hash_and_fetched_anew(server: FileServer, cache: Path) -> None:
    cache.mkdir()
    (cache / "w.bin.part").write_bytes(b"x" * 1000)
    (cache / "w.bin.part.id").write_text(f'"{hashlib.md5(DATA).hexdigest()}"')
    assert get(server, sha256=SHA256).read_bytes() == DATA
    assert [r for _, r in server.requests] == ["bytes=1000-", None]


def test_wrong_hash(server: FileServer, cache: Path) -> None:
    with pytest.raises(DownloadError, match=f"SHA-256 is {SHA256} instead of {'0' * 64}"):
        get(server, sha256="0" * 64)
    assert left_over(cache) == set()


def test_wrong_size(server: FileServer, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"1,048,576 bytes instead of 5"):
        get(server, size=5)
    assert left_over(cache) == set()


def test_a_cached_file_of_another_size_is_replaced(server: FileServer, cache: Path) -> None:
    cache.mkdir()
    (cache / "w.bin").write_bytes(b"short")
    assert get(server, size=len(DATA)).read_bytes() == DATA


def test_dead_server(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/w.bin"
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"(?i)refused.*try again later.*put it at .*w\.bin"):
        download(url, name="w.bin", progress=False, backoff=0.05)
    assert time.monotonic() - began > 0.14  # 0.05 and 0.1 s between three attempts
    assert left_over(cache) == set()


def test_a_server_that_says_nothing_times_out(server: FileServer, cache: Path) -> None:
    server.stall = 0.6
    with pytest.raises(DownloadError, match="timed out"):
        get(server, timeout=0.15, attempts=2)
    assert len(server.requests) == 2


def test_statuses(server: FileServer, cache: Path) -> None:
    server.statuses = [503, 429]
    assert get(server).read_bytes() == DATA
    assert len(server.requests) == 3
    with pytest.raises(DownloadError, match=r"404 Not Found.*check the address"):
        get(server, "/absent", name="absent")
    assert len(server.requests) == 4  # not tried again


def test_without_a_length(server: FileServer, cache: Path) -> None:
    server.announces_length = False
    seen: list[int | None] = []
    assert get(server, progress=lambda done, total: seen.append(total)).read_bytes() == DATA
    assert set(seen) == {None}
    server.cuts = [1000]
    with pytest.raises(DownloadError, match="SHA-256"):
        get(server, name="again.bin", sha256=SHA256)


def test_a_disk_that_takes_no_more_is_reported_and_not_tried_again(server: FileServer, cache: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DownloadError, match=r"File too large while writing .*w\.bin\.part"):
            get(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.requests) == 1
    assert get(server).read_bytes() == DATA
    assert server.requests[1] == ("/w.bin", "bytes=100000-")


def test_without_locks_each_process_has_a_part_of_its_own(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volo.models.weights.fcntl", None)  # as on Windows
    cache.mkdir()
    (cache / "w.bin.part").write_bytes(b"another process writes here")
    assert get(server, sha256=SHA256).read_bytes() == DATA
    with pytest.raises(DownloadError):
        get(server, name="x.bin", sha256="0" * 64)
    assert left_over(cache) == {"w.bin", "w.bin.part"}


CHILD = """
import sys
from volo.models.weights import download
print(download(sys.argv[1], name="w.bin", progress=lambda done, total: print(done, flush=True), backoff=0.01).name)
"""


def child(server: FileServer) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, server.url("/w.bin")], stdout=subprocess.PIPE, text=True)


def test_kill_9_and_again(server: FileServer, cache: Path) -> None:
    server.pause = 0.03
    process = child(server)
    for line in process.stdout:
        if int(line) > 0:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert left_over(cache) == {"w.bin.part", "w.bin.part.id"}
    on_disk = (cache / "w.bin.part").stat().st_size
    server.pause = 0.0
    assert get(server).read_bytes() == DATA
    assert [r for _, r in server.requests] == [None, f"bytes={on_disk}-" if on_disk else None]
    assert left_over(cache) == {"w.bin"}


def test_two_processes_download_once(server: FileServer, cache: Path) -> None:
    server.pause = 0.02
    processes = [child(server) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(output.endswith("w.bin\n") for output in outputs)
    assert (cache / "w.bin").read_bytes() == DATA
    assert len(server.requests) == 1


# The hub and the release


@pytest.fixture
def mirror(server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    monkeypatch.setenv("VOLO_HUB_URL", server.url("/hub/"))
    monkeypatch.setenv("VOLO_RELEASES_URL", server.url("/releases"))
    return server


HUB_FILE = "/hub/timm/volo_d1_224.sail_in1k/resolve/main/model.safetensors"
QUICK = {"progress": False, "backoff": 0.01}


def offer_on_hub(server: FileServer, data: bytes, sha256: str | None = None) -> None:
    """As the hub does: a redirect to a store, which names size and digest of the file where it leads to."""
    digest = sha256 or hashlib.sha256(data).hexdigest()
    server.redirects[HUB_FILE] = "/store/1"
    server.headers[HUB_FILE] = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
    server.files["/store/1"] = data


def test_hub_first_with_the_hash_of_the_redirect(mirror: FileServer, cache: Path) -> None:
    offer_on_hub(mirror, DATA)
    mirror.cuts = [400_000]
    assert fetch("volo_d1.224", **QUICK) == cached_path("volo_d1.224") == cache / "volo_d1.224.safetensors"
    assert cached_path("volo_d1.224").read_bytes() == DATA
    assert mirror.requests[-1] == ("/store/1", "bytes=400000-")
    mirror.files.clear()
    fetch("volo_d1.224", **QUICK)
    assert len(mirror.requests) == 4


def test_a_page_instead_of_the_file_is_noticed(mirror: FileServer, cache: Path) -> None:
    offer_on_hub(mirror, DATA)
    mirror.files["/store/1"] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match=r"26 bytes instead of 1,048,576[\s\S]*404"):
        fetch("volo_d1.224", **QUICK)
    assert left_over(cache) == set()


def test_release_when_the_hub_fails_and_says_so(
    mirror: FileServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offer_on_hub(mirror, DATA, sha256="ab" * 32)
    mirror.files["/releases/d1_224_84.2.pth.tar"] = b"release"
    assert fetch("volo_d1.224", **QUICK) == cache / "volo_d1.224.pth.tar"
    assert "abab" in caplog.text
    assert "release file instead" in caplog.text
    assert left_over(cache) == {"volo_d1.224.pth.tar"}
    mirror.files.clear()
    assert fetch("volo_d1.224", **QUICK) == cached_path("volo_d1.224", "release")


def test_neither_source(mirror: FileServer, cache: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch("volo_d5.512", **QUICK)
    for part in ("model.safetensors", "d5_512_87.07.pth.tar", "volo_d5.512.safetensors", "volo_d5.512.pth.tar"):
        assert part in str(caught.value)


def test_table() -> None:
    assert len(list_pretrained()) == 11
    assert list_pretrained("volo_d5") == ["volo_d5.224", "volo_d5.448", "volo_d5.512"]
    assert list_pretrained("volo_nano") == []
    assert all(w.variant in VARIANTS and w.tag == tag for tag, w in PRETRAINED.items())


def test_table_agrees_with_timm() -> None:
    timm = pytest.importorskip("timm")
    for weights in PRETRAINED.values():
        cfg = timm.models.get_pretrained_cfg(weights.hub_repo.removeprefix("timm/"))
        assert cfg.url == weights.url("release", base="https://github.com/sail-sg/volo/releases/download/volo_1")
        assert cfg.hf_hub_id == weights.hub_repo
        assert cfg.input_size == (3, weights.img_size, weights.img_size)
        assert cfg.crop_pct == weights.crop_pct_timm


# Reading


def small_model(**overrides) -> VOLO:
    config = {
        "depths": (1, 1, 1),
        "embed_dims": (16, 32),
        "num_heads": (2, 2),
        "stem_dim": 8,
        "num_class_blocks": 1,
        "img_size": 64,
        "num_classes": 7,
    }
    return VOLO(VOLOConfig(**{**config, **overrides}))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


STATE = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
LAYOUTS = {
    "plain": STATE,
    "ordered": OrderedDict(STATE),
    "state_dict": {"epoch": 3, "arch": "volo_d1", "state_dict": STATE},
    "the original's script": {"state_dict": OTHER, "state_dict_ema": STATE, "args": argparse.Namespace(lr=1e-3)},
    "ours": {"format": 1, "model": OTHER, "ema": STATE, "step": 5, "classes": ["a"], "best": {"top1": 1.0}},
    "ours without ema": {"format": 1, "model": STATE, "ema": None},
    "DDP": {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
    "compiled": {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()},
    "both": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
    "both, other way": {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=is_zip)
    assert equal(read_state_dict(path), STATE)


def test_safetensors_by_content_too(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.bin"):
        save_file(STATE, tmp_path / name)
        assert equal(read_state_dict(tmp_path / name), STATE)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused(is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "extra": Bomb()}, "w.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"w\.pth is refused.*posix\.mkdir"):
        read_state_dict("w.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    with pytest.raises(ValueError, match="no weight file"):
        read_state_dict("plain.pth")
    assert not Path("exploded").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (0, 1, 5, 9, 40, 200, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[: min(length, len(whole) - 1)])
        with pytest.raises(ValueError, match="damaged, cut off, or no weight file"):
            read_state_dict(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for content in (b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid", bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no weight file"):
            read_state_dict(path)
    for content, found in (
        ({"state_dict": {"lr": 1.0}}, "'lr'"),
        ([1, 2], "list"),
        ({}, r"\[\]"),
        (torch.ones(2), "Tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"holds no state dict.*{found}"):
            read_state_dict(path)
    with pytest.raises(ValueError, match="there is no weight file at"):
        read_state_dict(tmp_path / "absent.pth")


# Loading


def test_exact_load_from_a_file_and_a_dict(tmp_path: Path) -> None:
    source, model = small_model(), small_model()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    report = load_weights(model, tmp_path / "w.pth")
    assert report.is_exact
    assert str(report) == "every name and shape agrees"
    assert equal(model.state_dict(), source.state_dict())
    assert load_weights(small_model(), source.state_dict()).is_exact


def test_a_strict_failure_names_everything_and_changes_nothing() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = small_model(num_classes=5, img_size=96).state_dict()
    del given["norm.bias"]
    given["extra.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="left unchanged") as caught:
        load_weights(model, given)
    message = str(caught.value)
    for line in (
        "missing in the file: norm.bias",
        "unexpected in the file: extra.weight",
        "other shape: head.weight is 5 x 32 in the file, 7 x 32 in the model",
        "other shape: aux_head.bias is 5 in the file, 7 in the model",
        "other shape: pos_embed is 1 x 6 x 6 x 32 in the file, 1 x 4 x 4 x 32 in the model",
        "adapt_pos_embed=True, adapt_head=True",
    ):
        assert line in message
    assert equal(model.state_dict(), before)


def test_not_strict_loads_what_fits() -> None:
    model, source = small_model(), small_model(num_classes=5)
    given = source.state_dict()
    given.pop("norm.bias")
    given["extra"] = torch.ones(1)
    head = model.head.weight.clone()
    report = load_weights(model, given, strict=False)
    assert report.missing == ("norm.bias",)
    assert report.unexpected == ("extra",)
    assert ("head.weight", (5, 32), (7, 32)) in report.misshaped
    assert len(report.misshaped) == 4
    assert not report.is_exact
    assert torch.equal(model.cls_token, source.cls_token)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("size", [96, (64, 96), 32])
def test_adapt_pos_embed(size) -> None:
    source, model = small_model(img_size=(64, 80)), small_model(img_size=size)
    report = load_weights(model, source.state_dict(), adapt_pos_embed=True)
    assert len(report.adapted) == 1
    assert "resampled from 4 x 5" in report.adapted[0]
    rows, columns = model.pos_embed.shape[1:3]
    assert torch.equal(model.pos_embed, resample_pos_embed(source.pos_embed, (rows, columns)))
    assert not report.is_exact
    with pytest.raises(ValueError, match="pos_embed is 1 x 4 x 5 x 32"):  # other channels cannot be resampled
        load_weights(small_model(embed_dims=(16, 64)), source.state_dict(), adapt_pos_embed=True)


def test_adapt_head() -> None:
    source, model = small_model(num_classes=5), small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, source.state_dict(), adapt_head=True)
    assert len(report.adapted) == 2
    assert "head left as initialised (5 classes in the file, 7 in the model)" in report.adapted
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if "head" in name else source.state_dict())[name]), name
    same = load_weights(small_model(), model.state_dict(), adapt_head=True)
    assert same.is_exact  # heads that fit are loaded all the same

    headless = small_model(num_classes=0)
    assert "left out" in load_weights(headless, source.state_dict(), adapt_head=True).adapted[0]
    assert equal(headless.state_dict(), {n: t for n, t in source.state_dict().items() if "head" not in n})
    assert len(load_weights(model, headless.state_dict(), adapt_head=True).adapted) == 2
    with pytest.raises(ValueError, match=r"missing in the file: head\.weight"):
        load_weights(model, headless.state_dict())


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_adapt_stem(in_chans: int) -> None:
    source, model = small_model(), small_model(in_chans=in_chans)
    with pytest.raises(ValueError, match="adapt_stem=True"):
        load_weights(model, source.state_dict())
    report = load_weights(model, source.state_dict(), adapt_stem=True)
    assert report.adapted == (f"patch_embed.conv.0.weight turned from 3 input channels to {in_chans}",)
    adapt_input_conv = pytest.importorskip("timm.models").adapt_input_conv
    torch.testing.assert_close(
        model.patch_embed.conv[0].weight.data, adapt_input_conv(in_chans, source.patch_embed.conv[0].weight.data)
    )


# create_model(pretrained=...)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, VOLO]:
    """Small stand-ins for D1 and two of its published files, already in the cache."""
    config = small_model(img_size=224).config
    monkeypatch.setitem(VARIANTS, "volo_d1", config)
    models = {
        "volo_d1.224": VOLO(config).eval(),
        "volo_d1.384": VOLO(dataclasses.replace(config, img_size=384)).eval(),
    }
    cache.mkdir()
    save_file(models["volo_d1.224"].state_dict(), cached_path("volo_d1.224"))
    torch.save({"state_dict": models["volo_d1.384"].state_dict()}, cached_path("volo_d1.384", "release"))
    return models


def test_create_pretrained_by_size_and_tag(published: dict[str, VOLO], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = volo.create_model("volo_d1", pretrained=True).eval()
    assert equal(model.state_dict(), published["volo_d1.224"].state_dict())
    assert "every name and shape agrees" in caplog.text
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(images), published["volo_d1.224"](images))
    for options in ({"pretrained": True, "img_size": 384}, {"pretrained": "volo_d1.384"}):
        model = volo.create_model("volo_d1", **options)
        assert model.config.img_size == (384, 384)
        assert equal(model.state_dict(), published["volo_d1.384"].state_dict())


def test_create_pretrained_adapts_what_the_caller_asks(
    published: dict[str, VOLO], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = published["volo_d1.224"]
    model = volo.create_model(
        "volo_d1", pretrained=True, img_size=(256, 320), num_classes=3, in_chans=1, drop_path_rate=0.3
    )
    assert model.config.drop_path_rate == 0.3
    assert model.head.weight.shape == (3, 32)
    assert torch.equal(model.pos_embed, resample_pos_embed(source.pos_embed, (16, 20)))
    assert torch.equal(model.norm.weight, source.norm.weight)
    for what in ("resampled from 14 x 14 to 16 x 20", "head left as initialised", "3 input channels to 1"):
        assert what in caplog.text
    assert volo.create_model("volo_d1", pretrained=True, num_classes=0)(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_create_pretrained_errors(published: dict[str, VOLO]) -> None:
    with pytest.raises(ValueError, match=r"volo_d1\.225.*did you mean 'volo_d1\.224'"):
        volo.create_model("volo_d1", pretrained="volo_d1.225")
    with pytest.raises(
        ValueError, match=r"volo_d2\.224 are weights of volo_d2, not of volo_d1.*did you mean 'volo_d1\.224'"
    ):
        volo.create_model("volo_d1", pretrained="volo_d2.224")
    with pytest.raises(ValueError, match="no weights of volo_nano are published, only of volo_d1"):
        volo.create_model("volo_nano", pretrained=True)
    with pytest.raises(ValueError, match="neither a published tag nor an existing file"):
        volo.create_model("volo_d1", pretrained="runs/none/best.pt")
    with pytest.raises(ValueError, match=r"missing in the file: network\.2\.1"):
        volo.create_model("volo_d1", pretrained=True, depths=(1, 2, 1))


def test_create_pretrained_from_files(published: dict[str, VOLO], tmp_path: Path) -> None:
    """A plain file says sizes and classes by its shapes, one of our checkpoints by its configuration."""
    source = small_model(img_size=(96, 64), num_classes=11, in_chans=1, drop_path_rate=0.2)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    model = volo.create_model("volo_d1", pretrained=str(tmp_path / "plain.pth"))
    assert equal(model.state_dict(), source.state_dict())
    assert model.config == dataclasses.replace(source.config, drop_path_rate=0.0)

    own = {"format": 1, "model": source.state_dict(), "model_config": dataclasses.asdict(source.config)}
    torch.save(own, tmp_path / "best.pt")
    model = volo.create_model("volo_d1", pretrained=tmp_path / "best.pt")
    assert model.config == source.config
    model = volo.create_model("volo_d1", pretrained=tmp_path / "best.pt", num_classes=2)
    assert model.head.weight.shape == (2, 32)
    assert torch.equal(model.norm.weight, source.norm.weight)
    with pytest.raises(ValueError, match=r"another model than volo_d2: its depths is \(1, 1, 1\), not \(6, 4, 10, 4\)"):
        volo.create_model("volo_d2", pretrained=tmp_path / "best.pt")
    own["model_config"]["colour"] = "blue"
    torch.save(own, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"another version of volo.*colour"):
        volo.create_model("volo_d1", pretrained=tmp_path / "best.pt")


def test_create_pretrained_over_the_wire(published: dict[str, VOLO], mirror: FileServer, cache: Path) -> None:
    data = cached_path("volo_d1.224").read_bytes()
    cached_path("volo_d1.224").unlink()
    offer_on_hub(mirror, data)
    model = volo.create_model("volo_d1", pretrained="volo_d1.224")
    assert equal(model.state_dict(), published["volo_d1.224"].state_dict())
