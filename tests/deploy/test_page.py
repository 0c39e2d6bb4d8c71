"""The page: what it takes to write one, and its answer in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import HINT, WEB, Browser, find_browser
from drawings import goldfish
from PIL import Image

import volo
from volo.data.decode import decode_image
from volo.data.transforms import PixelPipeline, eval_transform
from volo.deploy.html import RUNTIME, WASM, find_web_runtime, write_page
from volo.inference.model_source import LoadedModel
from volo.inference.predictor import predict

CLASSES = ("ant", "</script><b>bee", "@MODEL@", "猫")
GOLD = "</script><b>@MODEL@ & 金魚"
"""A name that would break a careless page, for the goldfish."""


def test_without_the_runtime_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="npm install onnxruntime-web"):
        find_web_runtime(None)
    with pytest.raises(FileNotFoundError, match="--web-runtime"):
        find_web_runtime(tmp_path)
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in (RUNTIME, WASM):
        (dist / name).touch()
    assert find_web_runtime(None) == find_web_runtime(tmp_path) == find_web_runtime(dist) == dist


def test_class_names_cannot_break_the_page(tmp_path: Path):
    for name in (RUNTIME, WASM):
        (tmp_path / name).write_bytes(name.encode())
    page = tmp_path / "page.html"
    write_page(page, b"model", {"classes": list(CLASSES), "origin": "a test", "licence": "MIT"}, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 5 and "@MODEL@" in text.partition('id="about"')[2].partition("</script>")[0]
    assert text.count(base64.b64encode(b"model").decode()) == 1


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    its = volo.load("volo_nano")
    return dataclasses.replace(its, classes=(GOLD, *its.classes[1:]))


@pytest.fixture(scope="module")
def page(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    if find_browser() is None:
        pytest.skip(f"no Chromium here: {HINT}")
    try:
        runtime = find_web_runtime(WEB)
    except FileNotFoundError:
        pytest.skip(f"no ONNX Runtime Web here: {HINT}")
    path = tmp_path_factory.mktemp("page") / "page.html"
    report = volo.export(loaded, path, format="html", web_runtime=runtime, licence="Apache-2.0")
    assert path.stat().st_size == report.values["bytes"] < 30e6
    return path


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.offline()
        yield browser


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The page, freshly opened; whatever happened there, nothing was asked of other machines, and nothing went wrong."""
    browser.open(page)
    yield browser
    assert browser.requests == [] and browser.errors == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = {
        name: folder / name for name in ("fish.png", "turned.jpg", "clear.png", "large.png", "grey.png", "small.png")
    }
    fish = goldfish(480, 360)
    fish.save(paths["fish.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    fish.transpose(Image.Transpose.ROTATE_90).save(paths["turned.jpg"], exif=exif, quality=92)
    clear = fish.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(fish.size).point(lambda level: 255 * (level > 90)))
    clear.save(paths["clear.png"])
    goldfish(3000, 2250).save(paths["large.png"], compress_level=1)
    fish.convert("L").save(paths["grey.png"])
    fish.resize((40, 31)).save(paths["small.png"])
    return paths


ANSWERS = """[...document.querySelectorAll("#answers button")].map(b => {
  const [name, share] = b.querySelectorAll(".head span"), bar = b.querySelector(".bar");
  return [name.textContent, parseFloat(share.textContent) / 100,
    bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width];
})"""


def answered(browser: Browser, name: str) -> list[tuple[str, float, float]]:
    """Name, probability and length of the bar of each answer, once the page has answered to this image."""
    browser.wait_for(f"document.getElementById('state').textContent.startsWith({json.dumps(name + ': ')})")
    return [tuple(row) for row in browser.evaluate(ANSWERS)]


@pytest.mark.parametrize("name", ["fish.png", "turned.jpg", "clear.png", "large.png", "grey.png", "small.png"])
def test_a_dropped_image_gets_the_answer_of_predict(
    name: str, opened: Browser, loaded: LoadedModel, pictures: dict[str, Path]
):
    opened.drop([pictures[name]])
    given = answered(opened, name)
    (expected,) = predict(loaded, [pictures[name]], top=5)
    assert given[0][0] == expected.top[0][0] and (name == "grey.png" or given[0][0] == GOLD)
    # An image so large is scaled down by the browser first, in its own way.
    assert [p for _, p, _ in given] == pytest.approx(
        [p for _, p in expected.top], abs=3e-2 if "large" in name else 1e-2
    )
    assert [length for *_, length in given] == pytest.approx([p for _, p, _ in given], abs=5e-3)
    label = opened.evaluate("document.getElementById('canvas').getAttribute('aria-label')")
    assert label.startswith(f"{name}: {given[0][0]}, ")


def test_the_token_map_says_what_the_tokens_say(opened: Browser, loaded: LoadedModel, pictures: dict[str, Path]):
    opened.drop([pictures["fish.png"]])
    answered(opened, "fish.png")
    assert opened.evaluate("document.getElementById('map').hidden && document.getElementById('token').hidden")
    image = eval_transform(loaded.preprocessing)(decode_image(pictures["fish.png"]))
    with torch.inference_mode():
        images = PixelPipeline(loaded.preprocessing).eval()(image[None])
        tokens = loaded.model.class_and_token_logits(loaded.model.forward_features(images))[1][0].softmax(-1)
    opened.click("#tokens")
    opened.wait_for("!document.getElementById('map').hidden")
    first = int(tokens[:, 0].argmax())  # of the chosen class, the token that says so loudest
    side = round(len(tokens) ** 0.5)
    said = "document.getElementById('token').textContent"
    assert opened.evaluate(said).startswith(f"Row {first // side + 1}, column {first % side + 1}: ")
    # Point at each token in turn: the image of 480 x 360 is seen in its middle, 360 x 360.
    x, y, width, height = opened.evaluate(
        "(() => { const r = document.getElementById('map').getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
    )
    for i in range(len(tokens)):
        row, column = divmod(i, side)
        opened.move(x + width * (60 + 360 * (column + 0.5) / side) / 480, y + height * (row + 0.5) / side)
        where = f"Row {row + 1}, column {column + 1}: "
        opened.wait_for(f"{said}.startsWith({json.dumps(where)})")
        text = opened.evaluate(said)
        best = int(tokens[i].argmax())
        assert text.startswith(f"{where}{loaded.classes[best]}, ")
        share = text.removeprefix(f"{where}{loaded.classes[best]}, ").partition(" ")[0]
        assert float(share) / 100 == pytest.approx(float(tokens[i, best]), abs=1e-2)
    # The map is painted in the strength of the chosen class, and outside what the model saw it is dark.
    alpha = """(() => { const c = document.getElementById("map"), d = c.getContext("2d");
      return [[20, 180], [60 + 45, 10], [60 + 135, 100]].map(([x, y]) => d.getImageData(x, y, 1, 1).data[3] / 255); })()"""
    outside, corner, middle = opened.evaluate(alpha)
    assert outside == pytest.approx(2 / 3, abs=0.02)
    assert corner == pytest.approx(0.75 * float(tokens[0, 0]), abs=0.02)
    assert middle == pytest.approx(0.75 * float(tokens[side + 1, 0]), abs=0.02)
    opened.click("#answers li:nth-child(2) button")
    second = opened.evaluate("document.querySelector('#answers li:nth-child(2) .head span').textContent")
    assert second in opened.evaluate("document.getElementById('map').getAttribute('aria-label')")


def test_by_keyboard_alone(opened: Browser, pictures: dict[str, Path]):
    focused = "document.activeElement.id || document.activeElement.closest('li,div')?.parentElement.id || ''"

    def tab_to(name: str) -> None:
        for _ in range(12):
            opened.press("Tab", 9)
            if opened.evaluate("document.activeElement.id") == name:
                return
        raise AssertionError(f"{name} is not reached; the focus is at {opened.evaluate(focused)}")

    tab_to("file")
    outline = "getComputedStyle(document.getElementById('drop')).outlineStyle"
    assert opened.evaluate(outline) == "solid"  # where one is can be seen
    opened.choose([pictures["fish.png"]])  # in the system's own dialogue
    answered(opened, "fish.png")
    tab_to("tokens")
    opened.press(" ", 32, " ")
    opened.wait_for("!document.getElementById('map').hidden")
    opened.evaluate("document.getElementById('file').focus()")
    tab_to("map")
    said = "document.getElementById('token').textContent"
    for _ in range(4):
        opened.press("ArrowUp", 38)
        opened.press("ArrowLeft", 37)
    assert opened.evaluate(said).startswith("Row 1, column 1: ")
    opened.press("ArrowRight", 39)
    opened.press("ArrowDown", 40)
    assert opened.evaluate(said).startswith("Row 2, column 2: ")
    for _ in range(12):
        opened.press("Tab", 9)
        if opened.evaluate("Boolean(document.activeElement.closest('#answers'))"):
            break
    opened.press("Tab", 9)
    opened.press("Enter", 13, "\r")
    assert opened.evaluate("document.querySelector('#answers li:nth-child(2) button').ariaPressed") == "true"


def test_what_is_no_image_is_said_and_the_next_one_works(opened: Browser, pictures: dict[str, Path], tmp_path: Path):
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    opened.drop([notes])
    said = opened.wait_for("document.querySelector('#state.bad')?.textContent")
    assert said == "notes.txt is no image that this browser can read. Give a JPEG, PNG, WebP or GIF file."
    opened.drop([pictures["small.png"]])
    assert answered(opened, "small.png")[0][0] == GOLD
    assert not opened.evaluate("document.getElementById('state').classList.contains('bad')")


def test_what_is_said_of_a_file_given_while_the_model_loads_stays(
    browser: Browser, page: Path, pictures: dict[str, Path], tmp_path: Path
):
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    # The model is read by fetch, which waits here until it is told to go on.
    slow = "const now = fetch, told = new Promise(go => self.go = go); self.fetch = (...what) => told.then(() => now(...what));"
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source=f"{{ {slow} }}")
    browser.open(page)
    browser.send("Page.removeScriptToEvaluateOnNewDocument", **script)
    state = "document.getElementById('state').textContent"
    assert browser.evaluate(state).startswith("Starting")
    browser.drop([notes])
    browser.wait_for(f"{state}.startsWith('notes.txt is no image')")
    seen = "self.states = []; new MutationObserver(() => states.push(document.getElementById('state').textContent))"
    browser.evaluate(f"{seen}.observe(document.getElementById('state'), {{childList: true}}); go()")
    browser.drop([pictures["fish.png"]])
    assert answered(browser, "fish.png")[0][0] == GOLD
    assert not [text for text in browser.evaluate("states") if text.startswith("Ready")]


def test_several_images_in_turn(opened: Browser, loaded: LoadedModel, pictures: dict[str, Path], tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(pictures["fish.png"].read_bytes()[:99])
    names = ["grey.png", "fish.png"]
    opened.drop([pictures[names[0]], tmp_path / "broken.png", pictures[names[1]]])
    answered(opened, names[1])
    alt = opened.evaluate("[...document.querySelectorAll('#earlier img')].map(image => image.alt)")
    expected = [next(predict(loaded, [pictures[name]])).top[0][0] for name in names]
    assert [text.rpartition(", ")[0] for text in alt] == [f"{n}: {answer}" for n, answer in zip(names, expected)]
    opened.click("#earlier button")  # back to the first
    assert answered(opened, names[0])[0][0] == expected[0]
    assert opened.evaluate("document.querySelectorAll('#earlier img').length") == 2


def test_the_camera(opened: Browser):
    opened.click("#camera")
    assert len(answered(opened, "Camera")) == 5
    assert opened.evaluate("document.getElementById('camera').textContent") == "Stop the camera"
    opened.click("#camera")
    opened.wait_for("!document.getElementById('video').srcObject.active")
    assert opened.evaluate("document.getElementById('camera').textContent") == "Use the camera"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_and_can_be_read(width: int, dark: bool, browser: Browser, page: Path, pictures: dict[str, Path]):
    browser.open(page, width, 800, dark=dark)
    browser.drop([pictures["fish.png"]])
    answered(browser, "fish.png")
    browser.click("#tokens")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Every text stands out from what is behind it (WCAG: 4.5 to 1).
    contrasts = browser.evaluate(
        """(() => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
        return .2126 * r + .7152 * g + .0722 * b; };
      const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!c.startsWith("rgba")) return c; } return "rgb(255, 255, 255)"; };
      const texts = [...document.querySelectorAll("h1, #drop, #drop b, #camera, #state, .switch, #token, .head span, footer")];
      return texts.filter(e => e.checkVisibility()).map(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
        return [e.id || e.tagName, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]; }); })()"""
    )
    assert len(contrasts) > 15 and min(contrasts, key=lambda its: its[1])[1] >= 4.5, contrasts
