"""Segmenting images of any size: what is written, how large images are seen, and how much memory that takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import volo
from volo.cli.main import main
from volo.config import DataConfig, Recipe, SegmentConfig
from volo.data.transforms import PixelPipeline
from volo.inference import segment as segment_module
from volo.inference.model_source import LoadedModel, load
from volo.inference.segment import (
    blend,
    cityscapes_name,
    default_window,
    output_files,
    output_names,
    segment,
    write_cityscapes,
    write_mask,
    write_overlay,
)
from volo.inference.segment_evaluate import HowToTest
from volo.inference.windows import window_logits
from volo.models.checkpoint import FORMAT, model_config_dict, save_checkpoint


def tiny_classifier(num_classes: int = 3, **segment_options) -> LoadedModel:
    torch.manual_seed(0)
    model = volo.create_segmenter(
        "fpn_volo_nano", num_classes, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), stem_dim=8, channels=16
    ).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    with torch.no_grad():  # every class should occur somewhere
        model.decode_head.conv_seg.bias -= model(torch.randn(1, 3, 96, 96)).mean(dim=(0, 2, 3))
    names = tuple(f"class {i}" for i in range(num_classes))
    recipe = Recipe(task="segment", data=DataConfig(img_size=64), segment=SegmentConfig(**segment_options))
    return LoadedModel(model, "segment", names, recipe.data, "a test", recipe=recipe)


def save_run(folder: Path, num_classes: int, classes: tuple[str, ...] = ()) -> Path:
    """A checkpoint as a training would leave it."""
    classifier = tiny_classifier(num_classes)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "format": FORMAT,
        "model": classifier.model.state_dict(),
        "ema": None,
        "step": 1,
        "recipe": Recipe(task="segment", data=classifier.preprocessing).to_dict(),
        "model_config": model_config_dict(classifier.model),
        "classes": list(classes or classifier.classes),
        "metrics": {},
        "extras": {"colours": [list(c) for c in classifier.colours]},
    }
    save_checkpoint(folder / "best.pt", checkpoint)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    coarse.resize((150, 101), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_whole_picture_and_windows_agree_in_most_pixels(picture: Path) -> None:
    classifier = tiny_classifier()
    whole = next(segment(classifier, [picture]))
    assert whole.classes.shape == (101, 150) and whole.classes.dtype == np.uint8
    assert whole.image.shape == (3, 101, 150)
    assert len(np.unique(whole.classes)) > 1
    assert sum(whole.areas) == 101 * 150
    with torch.no_grad():
        logits = classifier.model(PixelPipeline(classifier.preprocessing).eval()(whole.image[None]))
    assert (whole.classes == logits[0].argmax(0).numpy()).all()
    # Windows of random weights see other surroundings than the whole image does, but the same pixels.
    windows = next(segment(classifier, [picture], how=HowToTest.by_windows(96)))
    assert (windows.classes == whole.classes).mean() > 0.5


def test_scales_flip_and_pictures_scaled_for_the_model(picture: Path) -> None:
    classifier = tiny_classifier()
    many = next(segment(classifier, [picture], how=HowToTest(scales=(0.5, 1.0), flip=True)))
    assert many.classes.shape == (101, 150)
    small = tiny_classifier(short_side=50)
    got = next(segment(small, [picture]))
    assert got.classes.shape == (101, 150)
    # Answers have the resolution of the image, not that of the 50 rows the model saw.
    rows_alike = (got.classes[0:-1:2] == got.classes[1::2]).all(axis=1).mean()
    assert rows_alike < 1.0


def test_large_pictures_are_seen_by_windows() -> None:
    classifier = tiny_classifier()
    assert default_window(classifier, (1000, 1000)).window is None
    assert default_window(classifier, (1100, 1000)).window == (512, 512)


def test_scales_and_flips_of_large_pictures_are_those_of_windows(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volo.inference.segment.WHOLE_PIXELS", 1000)
    monkeypatch.setattr("volo.inference.segment.WINDOW", 1)
    classifier = tiny_classifier()
    seen, done = set(), []
    classifier.model.register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape[-2:])))

    def result(**options) -> np.ndarray:
        return next(segment(classifier, [picture], on_window=lambda *n: done.append(n), **options)).classes

    many = result(scales=(0.5, 1.5), flip=True)
    assert seen == {(32, 32), (96, 96)}, "no more than a window at once"
    assert done == [(i + 1, 6) for i in range(6)]
    # A window that covers the image is the image.
    assert (result(how=HowToTest((200, 200), scales=(0.5, 1.5))) == result(how=HowToTest(scales=(0.5, 1.5)))).all()
    assert (many == result(how=HowToTest.by_windows(64, scales=(0.5, 1.5), flip=True))).all()
    assert (many != result()).any()


def test_a_broken_picture_does_not_stop_the_others(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    results = list(segment(tiny_classifier(), [tmp_path / "broken.png", picture]))
    assert results[0].error is not None and "broken.png" in results[0].error
    assert results[1].error is None and results[1].classes.size


def test_wide_pictures_are_seen_from_left_to_right(picture: Path) -> None:
    """Memory holds windows across the short side, and the answer is the same."""
    classifier, how = tiny_classifier(), HowToTest.by_windows((48, 64))
    with Image.open(picture) as image:
        image.crop((0, 0, 150, 101)).resize((90, 200)).save(picture.with_name("tall.png"))
        image.resize((400, 60)).save(picture.with_name("wide.png"))
    for name in ("tall.png", "wide.png"):
        got = next(segment(classifier, [picture.with_name(name)], how=how))
        images = got.image[None]
        strips = window_logits(
            classifier.model,
            images,
            (48, 64),
            how.steps,
            smooth=True,
            pixels=PixelPipeline(classifier.preprocessing).eval(),
        )
        with torch.no_grad():
            expected = torch.cat([strip for _, strip in strips], dim=2)[0].argmax(0).numpy()
        assert (got.classes == expected).mean() > 0.999


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.0)}, {"as_scored": True}], ids=str)
def test_answers_that_are_not_finite_are_an_error(picture: Path, bad: float, options: dict) -> None:
    classifier = tiny_classifier()
    with torch.no_grad():
        classifier.model.decode_head.conv_seg.bias[1] = bad
    with pytest.raises(ValueError, match=r"picture\.png: the model's answer is not finite"):
        next(segment(classifier, [picture], **options))


def test_only_results_of_ours_are_replaced(picture: Path, tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", 3), tmp_path / "out"
    first, second = tmp_path / "in" / "a.png", tmp_path / "in" / "b.png"
    first.parent.mkdir()
    for path in (first, second):
        shutil.copy(picture, path)
    command = ["segment", str(run), "--out", str(out), "--json", "--device", "cpu"]
    out.mkdir()
    (out / "b.png").write_bytes(b"drawn by hand")
    assert main([*command, str(first.parent)]) == 2
    assert (out / "b.png").read_bytes() == b"drawn by hand" and not (out / "a.png").exists()
    (out / "b.png").unlink()

    assert main([*command, str(first)]) == 0
    assert main([*command, str(second)]) == 0  # keeps the areas of the first
    assert main([*command, str(second), "--no-overlays"]) == 0

    def names() -> list[str]:
        return [Path(entry["picture"]).name for entry in json.loads((out / "areas.json").read_text())["pictures"]]

    assert names() == ["a.png", "b.png"]
    (out / "areas.json").unlink()  # as after kill -9: masks say what they are
    assert main([*command, str(first.parent)]) == 0
    other = save_run(tmp_path / "other", 4)
    assert main([command[0], str(other), *command[2:], str(first)]) == 2, "other classes"
    (out / "areas.json").write_text("[]")
    assert main([*command, str(first)]) == 2
    assert (out / "areas.json").read_text() == "[]"


def test_results_are_no_pictures(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", 3)
    (tmp_path / "here").mkdir()
    shutil.copy(picture, tmp_path / "here" / "a.png")
    monkeypatch.chdir(tmp_path / "here")
    for words in ([], [], ["--out", "other"]):
        assert main(["segment", str(run), ".", "--json", "--device", "cpu", *words]) == 0
        assert [entry["picture"] for entry in json.loads(capsys.readouterr().out)["pictures"]] == ["a.png"]
    assert main(["segment", str(run), "segmented", "--device", "cpu"]) == 2


def test_a_legend_names_classes_of_any_script_or_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A font that lacks the characters would draw the same box for every class."""
    image, classes = (
        torch.zeros(3, 40, 300, dtype=torch.uint8),
        np.repeat(np.arange(2, dtype=np.uint8), 20)[:, None] + np.zeros((1, 300), np.uint8),
    )
    colours = [(200, 0, 0), (0, 0, 200)]

    def legend(names: list[str]) -> bytes:
        write_overlay(tmp_path / "o.png", image, classes, names, colours)
        with Image.open(tmp_path / "o.png") as overlay:
            return overlay.crop((0, 40, *overlay.size)).tobytes()

    monkeypatch.setattr(segment_module, "FONTS", [])
    assert legend(["猫", "犬"]) == legend(["class 0", "class 1"])
    assert legend(["café", "th\udce9"]) == legend(["café", "th?"])  # a folder whose name is Latin-1
    monkeypatch.setattr(segment_module, "FONTS", [Path(matplotlib.get_data_path()) / "fonts"])
    font, names = segment_module._legend_font(["Привет", "გამარჯობა"], 20)
    assert names == ["Привет", "გამარჯობა"] and font.getname()[0].startswith("DejaVu")


def test_files(tmp_path: Path) -> None:
    classes = np.zeros((40, 300), np.uint8)
    classes[:, 100:200], classes[:, 200:] = 1, 2
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    write_mask(tmp_path / "m.png", classes, colours)
    with Image.open(tmp_path / "m.png") as mask:
        assert mask.mode == "P" and (np.asarray(mask) == classes).all()
        assert mask.convert("RGB").getpixel((150, 5)) == (0, 200, 0)
    image = torch.full((3, 40, 300), 100, dtype=torch.uint8)
    mixed = blend(image, classes, colours, opacity=0.5)
    assert mixed[5, 5].tolist() == [150, 50, 50] and mixed[5, 250].tolist() == [50, 50, 150]
    write_overlay(tmp_path / "o.png", image, classes, ["sky", "a tree", "car"], colours)
    with Image.open(tmp_path / "o.png") as overlay:
        assert overlay.width == 300 and overlay.height > 55
        below = {tuple(p) for p in np.asarray(overlay)[40:].reshape(-1, 3).tolist()}
    assert set(colours) <= below  # the legend


def test_an_overlay_leaves_the_background_and_draws_outlines(tmp_path: Path) -> None:
    classes = np.zeros((600, 40), np.uint8)
    classes[200:300, 10:30] = 1  # across the end of a strip
    classes[512:, 5:35] = 1  # as a strip begins
    image = torch.full((3, 600, 40), 100, dtype=torch.uint8)
    colours = [(0, 0, 0), (200, 0, 0)]

    def pixels(names: list[str], **options) -> np.ndarray:
        write_overlay(tmp_path / "o.png", image, classes, names, colours, **options)
        with Image.open(tmp_path / "o.png") as overlay:
            return np.asarray(overlay)[:600]

    mixed = pixels(["Background", "lesion"], opacity=0.5)
    assert (mixed[classes == 0] == 100).all()
    inner = np.zeros_like(classes, bool)
    inner[201:299, 11:29] = inner[513:, 6:34] = True
    assert (mixed[inner] == [150, 50, 50]).all()
    assert (mixed[(classes == 1) & ~inner] == [200, 0, 0]).all()
    assert (pixels(["Background", "lesion"], opacity=0)[inner] == 100).all()
    tinted = pixels(["sky", "lesion"], opacity=0.5)
    assert tinted[0, 0].tolist() == [50, 50, 50] and tinted[199, 20].tolist() == [0, 0, 0]


def test_the_opacity_of_overlays_is_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment", str(tmp_path), "x.png", "--alpha", "1.5"]) == 2
    assert "--alpha is the opacity of the colours, 0 to 1; given: 1.5" in capsys.readouterr().err


def test_cityscapes_submission(tmp_path: Path) -> None:
    write_cityscapes(tmp_path / "c.png", np.array([[0, 18], [13, 10]], np.uint8))
    assert np.asarray(Image.open(tmp_path / "c.png")).tolist() == [[7, 33], [26, 23]]
    assert cityscapes_name("x/berlin_000543_000019_leftImg8bit.png") == "berlin_000543_000019_pred_labelIds.png"


def test_masks_beside_images_are_no_images(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = save_run(tmp_path / "run", 3), tmp_path / "masks"
    for name in ("Images", "masks"):
        (data / "town" / name).mkdir(parents=True)
        shutil.copy(picture, data / "town" / name / "a.png")
    assert main(["segment", str(run), str(data), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert "left out: 1 masks" in said.err and len(json.loads(said.out)["pictures"]) == 1
    masks = data / "town" / "masks"
    assert main(["segment", str(run), str(masks), "--out", str(tmp_path / "asked"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pictures"]) == 1
    (data / "town" / "Images" / "a.png").unlink()
    assert main(["segment", str(run), str(data), "--out", str(tmp_path / "none"), "--json"]) == 2
    assert "no images are left" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_results_of_pictures_with_the_same_name_stay_apart() -> None:
    assert output_names([Path("a/1.png"), Path("b/2.png")]) == ["1", "2"]
    assert output_names([Path("x/a/1.png"), Path("x/b/1.png"), Path("2.png")]) == ["a__1", "b__1", "2"]
    assert output_names([Path("a/1.png"), Path("a/1.jpg")]) == ["1_png", "1_jpg"]


def test_results_replace_neither_pictures_nor_one_another(tmp_path: Path) -> None:
    street, overlay, jpeg = tmp_path / "street.png", tmp_path / "street_overlay.png", tmp_path / "street.jpg"
    assert output_files([jpeg], tmp_path) == [{"mask": "street.png", "overlay": "street_overlay.png"}]
    with pytest.raises(ValueError, match=r"street\.png, a result of .*street\.png, would replace the image"):
        output_files([street], tmp_path / "out" / "..")
    with pytest.raises(
        ValueError, match=r"overlay\.png, a result of .*street\.jpg, would replace .*street_overlay\.png"
    ):
        output_files([jpeg, overlay], tmp_path)
    with pytest.raises(
        ValueError, match=r"street\.png and .*street_overlay\.png would both write .*street_overlay\.png"
    ):
        output_files([street, overlay], tmp_path / "out")
    assert len(output_files([street, overlay], tmp_path / "out", overlays=False)) == 2
    twice = [tmp_path / part / "a_0_1_leftImg8bit.png" for part in ("x", "y")]
    with pytest.raises(ValueError, match="would both write .*a_0_1_pred_labelIds"):
        output_files(twice, tmp_path / "out", cityscapes=True)


def test_models_that_are_not_there_or_name_whole_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a run folder"):
        load(tmp_path / "nothing.pt")
    loaded = load(save_run(tmp_path / "run", 4))
    assert len(loaded.classes) == len(loaded.colours) == 4


MEASURE = """
import resource, sys
from volo.cli.main import main
code = main(["segment", sys.argv[1], sys.argv[2], "--out", sys.argv[3], "--json", "--threads", "1", *sys.argv[4:]])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_classes", "views"), [(11, []), (150, []), (11, ["--scales", "0.5", "1.25", "--flip"])], ids=str
)
def test_a_12_megapixel_picture_within_3_gb(tmp_path: Path, num_classes: int, views: list[str]) -> None:
    run = save_run(tmp_path / "run", num_classes)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    coarse.resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    command = [sys.executable, "-c", MEASURE, str(run), str(tmp_path / "large.jpg"), str(tmp_path / "out"), *views]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("peak")[2])
    assert peak < 3000, f"{peak} MB"
    content = json.loads((tmp_path / "out" / "areas.json").read_text())
    assert sum(area["pixels"] for area in content["pictures"][0]["areas"]) == 12_000_000
    with Image.open(tmp_path / "out" / "large.png") as mask:
        assert mask.size == (4000, 3000)
