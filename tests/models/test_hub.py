"""Weights from the hub and the release, against a server on the loopback, through the environment that users set."""

from __future__ import annotations

import io
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from local_hub import LocalHub, serving

from volo.data.files import cache_folder
from volo.models.hub import (
    PRETRAINED,
    SHIPPED_FOLDER,
    DownloadError,
    cached_path,
    fetch,
    fetch_from_hub,
    find,
    list_pretrained,
)
from volo.models.volo import VARIANTS


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with serving() as state:
        yield state


def run(code: str, hub: LocalHub, folder: Path, **env: str) -> Any:
    """What `code` prints as JSON, in a process that knows no other hub and no other caches."""
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "hf"),
        "VOLO_CACHE": str(folder / "volo"),
        "VOLO_RELEASES_URL": f"{hub.address}/releases",
        "no_proxy": "127.0.0.1",
    }
    code = "import json, logging\nfrom volo.models.hub import *\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | own | env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRY = """
def attempt(tag):
    try:
        return str(fetch(tag))
    except DownloadError as error:
        return str(error)
"""


def test_the_hubs_cache_is_shared_with_timm_and_lasts_without_a_network(hub: LocalHub, tmp_path: Path) -> None:
    hub.offer("timm/volo_d1_224.sail_in1k", model_safetensors=b"weights of d1")
    hub.offer("timm/volo_d2_224.sail_in1k", model_safetensors=b"weights of d2")
    code = """
from huggingface_hub import hf_hub_download
by_timm = hf_hub_download("timm/volo_d2_224.sail_in1k", "model.safetensors")  # as timm.create_model does
print(json.dumps([str(fetch("volo_d1.224")), str(find("volo_d2.224")), str(fetch("volo_d2.224")), by_timm, find("volo_d3.224")]))
"""
    d1, d2_found, d2_fetched, by_timm, nothing = run(code, hub, tmp_path)
    assert Path(d1).read_bytes() == b"weights of d1"
    assert Path(d1).is_relative_to(tmp_path / "hf")
    assert d2_found == d2_fetched == by_timm
    assert nothing is None
    assert len([path for path in hub.fetched if path.endswith("model.safetensors")]) == 2

    hub.files.clear()
    hub.requests.clear()
    offline = TRY + "print(json.dumps([str(fetch('volo_d1.224')), attempt('volo_d3.224')]))"
    again, refused = run(offline, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert again == d1
    assert "offline" in refused.lower()
    assert "did not try" in refused  # the release neither
    assert hub.requests == []


def test_the_release_where_the_hub_fails(hub: LocalHub, tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"w": torch.ones(3)}, whole)
    hub.files["/releases/d1_224_84.2.pth.tar"] = whole.getvalue()
    hub.files["/releases/d2_224_85.2.pth.tar"] = whole.getvalue()[:-40]
    hub.files["/releases/d3_224_85.4.pth.tar"] = b"<html>please log in</html>"
    hub.offer("timm/volo_d5_224.sail_in1k", model_safetensors=b"damaged on its way")
    hub.etags["/timm/volo_d5_224.sail_in1k/resolve/main/model.safetensors"] = "ab" * 32
    code = TRY + "print(json.dumps([*(attempt(f'volo_d{i}.224') for i in range(1, 6)), str(find('volo_d5.224'))]))"
    good, cut, page, absent, damaged, kept = run(code, hub, tmp_path)
    assert f"not {'ab' * 32}" in damaged
    assert kept == "None"
    assert good == str(tmp_path / "volo" / "volo_d1.224.pth.tar")
    assert Path(good).read_bytes() == whole.getvalue()
    for message in (cut, page):
        assert "damaged, cut off, or no weight file" in message
    assert "404" in absent
    assert "d4_224_85.7.pth.tar" in absent
    assert "give its path in place of volo_d4.224" in absent
    assert [path.name for path in (tmp_path / "volo").iterdir()] == ["volo_d1.224.pth.tar"]


def test_files_put_there_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path))
    cached_path("volo_d1.224", "release").write_bytes(b"x")
    assert fetch("volo_d1.224") == find("volo_d1.224") == tmp_path / "volo_d1.224.pth.tar"
    cached_path("volo_d1.224").write_bytes(b"y")
    assert fetch("volo_d1.224") == tmp_path / "volo_d1.224.safetensors"


def test_without_a_home_the_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a user of its own number: no entry in the password file, no HOME."""

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("VOLO_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(ValueError, match="set VOLO_CACHE to a folder that can be written, or HOME"):
        cache_folder()
    assert find("volo_d1.224") is None
    with pytest.raises(DownloadError, match="set HF_HOME to a folder that can be written, or HOME"):
        fetch_from_hub("user/name", "model.safetensors")


def test_our_own_weights_from_where_they_are_released(hub: LocalHub, tmp_path: Path) -> None:
    hub.files["/own/volo_nano.safetensors"] = b"other weights"
    hub.files["/whole/volo_nano.safetensors"] = (SHIPPED_FOLDER / "volo_nano.safetensors").read_bytes()
    code = """
import os
from pathlib import Path
import volo.models.hub as hub
hub.SHIPPED_FOLDER = hub.CHECKOUT_FOLDER = Path("nowhere")
told = []
for url in (None, "/own", "/whole/", None):
    os.environ.pop("VOLO_WEIGHTS_URL", None)
    if url:
        os.environ["VOLO_WEIGHTS_URL"] = os.environ["HF_ENDPOINT"] + url
    told.append([attempt("volo_nano"), [p.name for p in cache_folder().glob("*")]])
print(json.dumps(told))
"""
    nowhere, wrong, fetched, again = run(TRY + code, hub, tmp_path)
    assert (
        "VOLO_WEIGHTS_URL" in nowhere[0] and "volo_nano.safetensors into $VOLO_CACHE" in nowhere[0] and nowhere[1] == []
    )
    assert "another file" in wrong[0] and wrong[1] == [], "not the one that we released"
    assert fetched == again == [str(tmp_path / "volo/volo_nano.safetensors"), ["volo_nano.safetensors"]]


def test_names_that_no_repository_has() -> None:
    with pytest.raises(DownloadError, match="a/b/c"):
        fetch_from_hub("a/b/c", "model.safetensors")


def test_table() -> None:
    assert list_pretrained() == [*PRETRAINED, "volo_nano", "volo_tiny"] and len(PRETRAINED) == 11
    assert list_pretrained("volo_d5") == ["volo_d5.224", "volo_d5.448", "volo_d5.512"]
    assert list_pretrained("volo_tiny") == ["volo_tiny"] and list_pretrained("volo_small") == []
    assert all(w.variant in VARIANTS and w.tag == tag for tag, w in PRETRAINED.items())


def test_table_agrees_with_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.delenv("VOLO_RELEASES_URL", raising=False)
    for weights in PRETRAINED.values():
        cfg = timm.models.get_pretrained_cfg(weights.hub_repo.removeprefix("timm/"))
        assert cfg.url == weights.release_url
        assert cfg.hf_hub_id == weights.hub_repo
        assert cfg.input_size == (3, weights.img_size, weights.img_size)
        assert cfg.crop_pct == weights.crop_pct_timm
