"""`volo.export`: files that give the model's answers in their own runtime, and nothing where they do not."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import centred, decided_volo, with_one_weight_changed
from torch import Tensor, nn

import volo
from volo.cli.main import main
from volo.config import DataConfig
from volo.data.decode import decode_image
from volo.data.targets import Output, TableTargets
from volo.data.transforms import PixelPipeline, eval_transform
from volo.deploy import check
from volo.deploy import export as exporting
from volo.deploy.check import MismatchError
from volo.deploy.program import WithPreprocessing, prepare
from volo.inference import exported as opening
from volo.inference.evaluate import evaluate
from volo.inference.model_source import LoadedModel, load
from volo.inference.predictor import predict
from volo.inference.segment import segment
from volo.inference.segment_evaluate import HowToTest
from volo.models.factory import create_segmenter

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("ant", "bee", "猫", "dog")
TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes in folders of the classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(8):
        size = [(16, 16), (40, 23), (23, 40), (97, 64)][i % 4]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = folder / CLASSES[i % 4] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def loaded(pictures: list[Path]) -> LoadedModel:
    """A model that gives different answers to different images, as trained ones do."""
    data = DataConfig(img_size=16, crop_pct=0.8)
    model = centred(decided_volo(len(CLASSES), **TINY), check.read_images(pictures, data))
    return LoadedModel(model, "classify", CLASSES, data, "a test")


@pytest.fixture(scope="module")
def onnx_file(loaded: LoadedModel, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    report = volo.export(loaded, out, data=pictures[0].parents[1], licence="MIT")
    assert report.path == out
    return out


def same_predictions(one: LoadedModel, other: LoadedModel, pictures: list[Path], tolerance: float) -> None:
    for mine, expected in zip(predict(other, pictures, top=4), predict(one, pictures, top=4), strict=True):
        assert mine.error is None and mine.top[0][0] == expected.top[0][0]
        assert dict(mine.top) == pytest.approx(dict(expected.top), abs=tolerance)


def test_onnx_answers_as_the_model_wherever_it_is_used(loaded: LoadedModel, onnx_file: Path, pictures: list[Path]):
    assert len({prediction.top[0][0] for prediction in predict(loaded, pictures)}) > 1
    exported = load(onnx_file)
    assert exported.classes == CLASSES and exported.preprocessing.crop_pct == 0.8 and exported.task == "classify"
    same_predictions(loaded, exported, pictures, 1e-5)
    # `volo evaluate` goes this way.
    pixels = PixelPipeline(loaded.preprocessing)
    images = torch.stack([eval_transform(loaded.preprocessing)(decode_image(path)) for path in pictures])
    batch = {"image": images, "target": torch.arange(8) % 4, "index": torch.arange(8)}
    scores = [evaluate(m.model, [batch], pixels, num_classes=4, device="cpu") for m in (loaded, exported)]
    assert scores[0]["top1"] == scores[1]["top1"] and scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-5)
    with pytest.raises(ValueError, match="16 x 16"):
        exported.model(torch.zeros(1, 3, 24, 24))


def test_report_and_graph(onnx_file: Path):
    report = json.loads(onnx_file.with_name("model.onnx.json").read_text(encoding="utf-8"))
    assert report["opset"] == 20 and report["largest_rank"] <= 4 and report["compared_on"] == "8 images"
    assert [row["shape"][0] for row in report["compared"]] == [1, 8]
    assert all(row["relative_error"] < 1e-4 and row["top1_agreement"] == 1 for row in report["compared"])
    assert report["not_supported"]["TensorRT"]["missing"] == []
    assert not {"Col2Im", "ScatterND", "Einsum"} & set(report["operators"])
    assert all(2026 <= int(table["date"][:4]) and table["source"] for table in report["not_supported"].values())

    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["licence"] == "MIT" and json.loads(about["volo"])["classes"] == list(CLASSES)
    steps = {name for node in model.graph.node if node.op_type == "Slice" for name in node.input[4:]}
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert all((values[name] == 1).all() for name in steps if name in values)


def test_opset_17_for_tensorrt(loaded: LoadedModel, tmp_path: Path):
    report = volo.export(loaded, tmp_path / "trt.onnx", opset=17, dynamic=(), batch_size=2)
    assert report.values["opset"] == 17
    model = onnx.load(tmp_path / "trt.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    onnx.checker.check_model(model, full_check=True)
    # A batch of five goes through a file made for two.
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "trt.onnx").model(images), loaded.model(images), atol=1e-5, rtol=1e-4
        )


def test_pixels_in_probabilities_out_without_volo(loaded: LoadedModel, pictures: list[Path], tmp_path: Path):
    path = tmp_path / "pixels.onnx"
    volo.export(loaded, path, with_preprocessing=True, data=pictures[0].parents[1])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for picture, expected in zip(pictures, predict(loaded, pictures, top=4)):
        pixels = np.asarray(Image.open(picture).convert("RGB"))[None]
        (probabilities,) = session.run(None, {"pixels": pixels})
        answer = dict(zip(CLASSES, probabilities[0].tolist()))
        assert max(answer, key=answer.__getitem__) == expected.top[0][0]
        assert answer == pytest.approx(dict(expected.top), abs=1e-2)
    same_predictions(loaded, load(path), pictures, 1e-2)
    with pytest.raises(ValueError, match="preprocessing inside"):
        evaluate(load(path).model, [], PixelPipeline(loaded.preprocessing), num_classes=4, device="cpu")


@pytest.mark.parametrize("crop_pct", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("img_size", [16, (16, 24)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_as_matrices(crop_pct: float, img_size: int | tuple[int, int], interpolation: str):
    data = DataConfig(
        img_size=img_size,
        crop_pct=crop_pct,
        interpolation=interpolation,  # type: ignore[arg-type]
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    levels: list[Tensor] = []
    seen = nn.Identity()
    seen.register_forward_hook(lambda module, args, out: levels.append(out * 255))
    preprocessing = WithPreprocessing(seen, data)
    for seed, (height, width) in enumerate([(16, 16), (50, 33), (33, 50), (9, 12), (64, 200), (5, 171)]):
        pixels = check.made_pixels(height, width, seed)
        preprocessing(pixels)
        expected = eval_transform(data)(pixels[0].permute(2, 0, 1)).float()
        difference = (levels[-1][0] - expected).abs()
        assert difference.max() < 1.01 and difference.mean() < 0.2, (
            height,
            width,
        )  # one grey level, where halves are rounded


def test_openvino(loaded: LoadedModel, pictures: list[Path], tmp_path: Path):
    pytest.importorskip("openvino")
    volo.export(loaded, tmp_path / "model.xml", format="openvino")
    assert {path.name for path in tmp_path.iterdir()} == {"model.xml", "model.bin", "model.xml.json"}
    same_predictions(loaded, load(tmp_path / "model.xml"), pictures, 1e-5)


def test_torch_program_and_one_with_code_in_it(loaded: LoadedModel, pictures: list[Path], tmp_path: Path):
    path = tmp_path / "model.pt2"
    volo.export(loaded, path, format="torch")
    same_predictions(loaded, load(path), pictures, 1e-5)

    class Code:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "was_run",)

    changed = tmp_path / "code.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = io.BytesIO()
            if name.endswith(".pt"):
                torch.save(Code(), content, pickle_module=pickle)
            new.writestr(name, content.getvalue() or old.read(name))
    with pytest.raises(ValueError, match=r"code\.pt2"):
        load(changed)
    assert not (tmp_path / "was_run").exists()


def test_one_changed_weight_leaves_no_file(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "prepare", with_one_weight_changed(prepare))
    with pytest.raises(MismatchError, match="No file was written"):
        volo.export(loaded, tmp_path / "model.pt2", format="torch")
    assert list(tmp_path.iterdir()) == []


def test_int8_on_the_command_line(
    loaded: LoadedModel, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved = volo.save_pretrained(loaded, tmp_path / "saved")
    out = tmp_path / "int8.onnx"
    data = str(pictures[0].parents[1])
    arguments = ["export", str(saved), "--dtype", "int8", "--data", data, "--max-drop", "100", "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "int8, opset 20" in said.out and "TensorRT does not list" in said.err and "DynamicQuantizeLinear" in said.err
    assert out.is_file()
    # A second time it would replace what is there.
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "onxn"}, "onnx"),
        ({"format": "torch", "out": "x.pt2", "dtype": "int8"}, "fp32, fp16, bf16"),
        ({"dynamic": ("height",)}, "batch, size"),
        ({"opset": 12}, "17 to"),
        ({"dtype": "int8"}, "--data FOLDER"),
        ({"batch_size": 0}, "at least 1"),
        ({"out": "x.bin"}, r"\.onnx"),
        ({"data": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_refusals_come_before_any_work(loaded: LoadedModel, options: dict[str, object], message: str, tmp_path: Path):
    options = dict(options)
    out = tmp_path / str(options.pop("out", "x.onnx"))
    with pytest.raises((ValueError, OSError), match=message):
        volo.export(loaded, out, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_missing_runtime_and_impossible_places(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="img_size"):
        volo.export(loaded.model, tmp_path / "x.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        volo.export(loaded, tmp_path / "file" / "x.pt2", format="torch")
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'volo\[deploy\]'"):
        volo.export(loaded, tmp_path / "x.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_that_are_no_exports(tmp_path: Path):
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_one_file_for_every_size(loaded: LoadedModel, name: str, tmp_path: Path):
    out = tmp_path / f"model{exporting.KINDS[name].ending}"
    report = volo.export(loaded, out, format=name, dynamic=("batch", "size"))  # type: ignore[arg-type]
    assert [row["shape"] for row in report.values["compared"]][-1] == [2, 3, 32, 16]


@pytest.mark.slow
def test_segmenter(tmp_path: Path):
    torch.manual_seed(0)
    model = create_segmenter("fpn_volo_nano", num_classes=3, img_size=32, **TINY).eval()
    loaded = LoadedModel(model, "segment", ("a", "b", "c"), DataConfig(img_size=(32, 48)), "a test")
    report = volo.export(loaded, tmp_path / "segmenter.onnx")
    assert report.values["largest_rank"] <= 4 and "Col2Im" not in report.values["operators"]
    # Windows of the file's size, wherever they come from.
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(picture)
    exported = load(tmp_path / "segmenter.onnx", task="segment")
    assert exported.colours == loaded.colours
    how = HowToTest.by_windows((32, 48))
    mine, expected = (next(iter(segment(m, [picture], how=how))) for m in (exported, loaded))
    assert mine.error is None and (mine.classes == expected.classes).mean() > 0.999
    assert next(iter(segment(exported, [picture]))).error is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_d1_and_timms(name: str, tmp_path: Path):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("volo_d1_224").eval()
    volo.fuse(theirs, portable=True)
    for label, model in (("ours", volo.create_model("volo_d1").eval()), ("theirs", theirs)):
        out = tmp_path / f"{label}{exporting.KINDS[name].ending}"
        report = volo.export(model, out, format=name, img_size=224)  # type: ignore[arg-type]
        assert max(row["relative_error"] for row in report.values["compared"]) < 1e-4
        out.unlink()


def test_tables_and_archives_are_images_to_compare_on(loaded: LoadedModel, pictures: list[Path], tmp_path: Path):
    """What `volo train` and `volo evaluate` take as data, export takes, too."""
    rows = [f"{path},{path.parent.name}" for path in pictures]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 16, 16, 3), np.uint8), labels=np.arange(4), classes=CLASSES)
    for name, count in (("labels.csv", len(pictures)), ("data.npz", 4)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "No complete tensor")  # PyTorch's own words, of no use to anybody here
            values = volo.export(loaded, tmp_path / f"{name}.pt2", format="torch", data=tmp_path / name).values
        assert values["compared_on"] == f"{count} images"


def test_too_few_images_for_a_fixed_batch_are_said(loaded: LoadedModel, pictures: list[Path], tmp_path: Path):
    """Before anything is written."""
    folder = pictures[0].parents[1]
    with pytest.raises(ValueError, match="batches of 16 .*: give more with --data, or export with --dynamic batch"):
        volo.export(loaded, tmp_path / "x.onnx", data=folder, dynamic=(), batch_size=16)
    assert list(tmp_path.iterdir()) == []


def test_the_same_answers_of_a_table_are_those_of_its_outputs():
    """Largest of all numbers of a row, as of a classifier, says nothing about a table."""
    targets = TableTargets((Output("n", "number"), Output("kind", "class", ("a", "b"))))
    model = torch.nn.Flatten()
    images = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])[:, :, None, None]

    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) + torch.tensor([3.0, 0.0, 0.0])  # another number, the same class

    class Flipped(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, [0, 2, 1]]

    for other in (Other(), Flipped()):
        (row,) = check.compare(model, other, "int8", [images], 0.0, targets)  # type: ignore[arg-type]
        assert row["top1_agreement"] == 0.5
    (row,) = check.compare(model, model, "int8", [images], 0.0, targets)  # type: ignore[arg-type]
    assert row["top1_agreement"] == 1.0


@pytest.mark.parametrize("name", ["x.pt2", "x.pt2.json"])
def test_a_folder_is_never_replaced(loaded: LoadedModel, tmp_path: Path, name: str):
    """It would go with all that is in it."""
    kept = tmp_path / name / "of the user.txt"
    kept.parent.mkdir()
    kept.write_text("x")
    with pytest.raises(ValueError, match=f"{name} is a folder, which is never replaced.*--out"):
        volo.export(loaded, tmp_path / "x.pt2", format="torch", overwrite=True)
    assert kept.read_text() == "x" and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_cannot_be_is_refused_before_the_work(loaded: LoadedModel, tmp_path: Path, monkeypatch):
    (tmp_path / "a file").write_text("x")
    monkeypatch.setattr(exporting, "make_program", lambda *args, **how: pytest.fail("the work has begun"))
    with pytest.raises(OSError, match="cannot be written to .*choose another place with --out"):
        volo.export(loaded, tmp_path / "a file" / "x.pt2", format="torch")
