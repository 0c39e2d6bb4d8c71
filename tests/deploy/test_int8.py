"""int8: calibrated on some images, judged on others, and the layers that lose the answers are found by name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import centred, decided_volo
from torch import Tensor, nn

import volo
from volo.cli.export import summary
from volo.config import DataConfig, Recipe
from volo.data.targets import Output, TableTargets
from volo.deploy import accuracy
from volo.deploy.accuracy import Feed, Images, Int8, Judge, block_of, find_images
from volo.deploy.check import MismatchError, made_images
from volo.deploy.html import RUNTIME, WASM
from volo.deploy.program import WithTokens
from volo.deploy.quantize import nodes_of_layers
from volo.inference.exported import open_exported
from volo.inference.model_source import LoadedModel, load
from volo.models.factory import create_segmenter

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("ant", "bee", "cat", "dog")
TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
VICTIM = "network.0.0.mlp.fc1"
DATA = DataConfig(img_size=16, crop_pct=1.0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return made_images(32, 16, 16)


@pytest.fixture(scope="module")
def loaded(images: Tensor) -> LoadedModel:
    """A model that gives different answers to different images, as trained ones do."""
    model = centred(decided_volo(len(CLASSES), **TINY), images)
    return LoadedModel(model, "classify", CLASSES, DATA, "a test")


@pytest.fixture(scope="module")
def spoilt(loaded: LoadedModel) -> LoadedModel:
    """The same function, with one layer whose weights no int8 with a scale for each channel can hold: what a channel gains
    a hundred thousandfold in LayerNorm, its weights lose, beside channels that keep theirs."""
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        factor = torch.ones(16)
        factor[:8] = 1e5
        block = model.network[0][0]
        block.norm2.weight.mul_(factor)
        block.norm2.bias.mul_(factor)
        block.mlp.fc1.weight.div_(factor)
    return LoadedModel(model, "classify", CLASSES, DATA, "a test")


@pytest.fixture(scope="module")
def folder(loaded: LoadedModel, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders of the classes that the model gives them."""
    root = tmp_path_factory.mktemp("pictures")
    pixels = images * torch.tensor(DATA.std).view(3, 1, 1) + torch.tensor(DATA.mean).view(3, 1, 1)
    for i, picture in enumerate((pixels.clamp(0, 1) * 255).byte()):
        array = picture.permute(1, 2, 0).numpy()
        normalised = accuracy.PixelPipeline(DATA).eval()(picture[None])
        with torch.no_grad():
            answer = CLASSES[int(loaded.model(normalised).argmax())]
        (root / answer).mkdir(exist_ok=True)
        Image.fromarray(array).save(root / answer / f"{i:02}.png")
    for name in CLASSES:
        (root / name).mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize("way", ["dynamic", "static", "symmetric"])
def test_the_layer_that_cannot_be_quantised_is_named_and_kept(
    way: str, loaded: LoadedModel, spoilt: LoadedModel, folder: Path, images: Tensor, tmp_path: Path
):
    with torch.no_grad():
        torch.testing.assert_close(spoilt.model(images), loaded.model(images), atol=1e-3, rtol=1e-3)
    heard: list[str] = []
    good, bad = (
        volo.export(
            model,
            tmp_path / f"{name}.onnx",
            dtype="int8",
            int8=way,  # type: ignore[arg-type]
            opset=17 if way == "symmetric" else None,
            data=folder,
            max_drop=10,
            on_note=heard.append,
        )
        for name, model in (("good", loaded), ("bad", spoilt))
    )
    assert good.values["int8"]["left_in_floating_point"] == []
    told = bad.values["int8"]
    assert told["left_in_floating_point"] == [VICTIM] and told["way"] == way
    assert told["tried"][0]["top1"] < 90 <= told["top1"] and told["top1_before"] == 100
    assert any(VICTIM in line for line in heard) and VICTIM in summary(bad.path, bad.values)
    # The figures are those of the file.
    assert set(load(bad.path).classes) == set(CLASSES)
    model = onnx.load(bad.path)
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == told["layers"] - 1
    # Two products of an 8-bit activation and a weight of 7 bits fit into 16 bits, where AVX2 adds them.
    largest = max(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in weights)
    assert largest <= 64


def test_static_is_calibrated_on_some_images_and_judged_on_others(loaded: LoadedModel, folder: Path, tmp_path: Path):
    values = volo.export(loaded, tmp_path / "x.onnx", dtype="int8", int8="static", data=folder, max_drop=20).values
    told = values["int8"]
    assert told["calibrated_on"] == f"8 images of {folder}" and told["judged_on"] == f"24 other images of {folder}"
    assert values["compared_on"] == told["judged_on"] and "DequantizeLinear" in values["operators"]
    assert json.loads((tmp_path / "x.onnx.json").read_text(encoding="utf-8"))["int8"] == told


def test_symmetric_is_what_tensorrt_takes(loaded: LoadedModel, folder: Path, tmp_path: Path):
    path = tmp_path / "trt.onnx"
    how = {"dtype": "int8", "int8": "symmetric", "opset": 17, "dynamic": (), "batch_size": 2, "max_drop": 20}
    report = volo.export(loaded, path, data=folder, **how)  # type: ignore[arg-type]
    assert report.values["not_supported"]["TensorRT"]["missing"] == []
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    zeros = [values[node.input[2]] for node in model.graph.node if node.op_type.endswith("quantizeLinear")]
    zeros += [
        values[node.input[2]] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert zeros and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)  # no int32 biases, no offsets


def test_nothing_suffices(loaded: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Judge, "accepts", lambda self, score: False)
    with pytest.raises(
        MismatchError, match=r"of \d+ layers in floating point are not enough.*--max-drop.*No file"
    ) as error:
        volo.export(loaded, tmp_path / "x.onnx", dtype="int8", data=folder)
    assert "largest errors of the logits come from" in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_noticed_after_the_search(loaded: LoadedModel, folder: Path, tmp_path: Path, monkeypatch):
    """The search runs models in memory; what counts is the file."""

    def damaged(self: Int8, quantizer, open_):  # type: ignore[no-untyped-def]
        model = quantizer.quantize()
        for tensor in model.graph.initializer:
            if tensor.name.startswith("head.weight") and tensor.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
        return model, {}

    monkeypatch.setattr(Int8, "guard", damaged)
    with pytest.raises(MismatchError, match="as it was written"):
        volo.export(loaded, tmp_path / "x.onnx", dtype="int8", data=folder)
    assert list(tmp_path.iterdir()) == []


class Planned:
    """A quantiser of a model that adds the errors of its layers."""

    def __init__(self, harm: dict[str, float]) -> None:
        self.harm, self.layers, self.made = harm, tuple(harm), 0

    def quantize(self, keep: Collection[str] = ()) -> frozenset[str]:
        self.made += 1
        return frozenset(keep)

    def open(self, keep: Collection[str]) -> Callable[[np.ndarray], list[np.ndarray]]:
        harm = sum(error for layer, error in self.harm.items() if layer not in keep)
        shift = np.array([[0.0, 1.0]], np.float32) * harm
        return lambda x: [np.stack([x[:, 0, 0, 0], np.zeros(len(x))], 1).astype(np.float32) + shift]

    trial = open


def plan(
    harm: dict[str, float], max_drop: float = 1.0, max_changed: float | None = None, labels: Tensor | None = None
) -> tuple[list[str], int]:
    """100 images, whose first logit is ahead by 0.01 to 1.00."""
    ahead = [torch.full((3, 16, 16), 0, dtype=torch.uint8) for _ in range(100)]
    feed = Feed(Images(lambda i: ahead[i], range(100), "images", labels), DATA, 100, False, False)
    inputs = (torch.arange(1, 101) / 100).view(100, 1, 1, 1).expand(100, 3, 16, 16)

    class Given(Feed):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([inputs[: len(self)]])

    given = Given(feed.images, DATA, 100, False, False)
    judge = Judge(given, [torch.stack([inputs[:, 0, 0, 0], torch.zeros(100)], 1)], None, max_drop, max_changed)
    quantizer = Planned(harm)
    _, report = Int8("static", given, judge).guard(quantizer, quantizer.open)
    return report["left_in_floating_point"], quantizer.made


@pytest.mark.parametrize("guilty", [[3], [0, 17], [5, 6, 7], [2, 8, 14, 20, 26]])
def test_no_more_layers_are_kept_than_suffice(guilty: list[int]):
    harm = {f"network.{i // 4}.{i % 4}": 0.3 if i in guilty else 1e-5 for i in range(40)}
    kept, made = plan(harm)
    assert sorted(kept) == sorted(f"network.{i // 4}.{i % 4}" for i in guilty) and made < 15
    assert plan(dict.fromkeys(harm, 1e-5)) == ([], 1)


def test_a_layer_that_only_looks_harmful_is_given_back():
    """Alone the first is the worst, but its error has the other sign than those that matter."""
    kept, _ = plan({"a.b": -0.5, "c.d": 0.45, "e.f": 0.3, "g.h": 1e-6, "i.j": 1e-6, "k.l": 1e-6}, max_drop=20)
    assert kept == ["c.d", "e.f"]


def test_answers_may_change_less_than_the_accuracy():
    """Half of the answers that change become right, and the others wrong: the accuracy stays."""
    harm = {"a.b": 0.2, "c.d": 1e-5, "e.f": 1e-5, "g.h": 1e-5}
    labels = torch.arange(100) % 2
    assert plan(harm, labels=labels)[0] == []
    assert plan(harm, labels=labels, max_changed=1.0)[0] == ["a.b"]
    assert plan(harm, labels=labels, max_changed=20.0)[0] == []


def test_blocks():
    assert block_of("network.0.1.attn.v") == "network.0.1" and block_of("head") == "head"
    assert block_of("patch_embed.conv.3") == "patch_embed.conv" and block_of("backbone.network.2.0.mlp.fc1").endswith(
        "2.0"
    )


def test_a_run_needs_no_folder(loaded: LoadedModel, images: Tensor, folder: Path, tmp_path: Path):
    data = DataConfig(path=str(folder), img_size=16, crop_pct=1.0, val_fraction=0.5)
    run = LoadedModel(loaded.model, "classify", CLASSES, data, "a run", recipe=Recipe(data=data))
    calibration, judged = find_images(run, None)
    assert "training images" in calibration.what and "held-out images" in judged.what and judged.labels is not None
    shown = [{i.load(n).numpy().tobytes() for n in i.numbers} for i in (calibration, judged)]
    assert not shown[0] & shown[1]
    with torch.no_grad():
        pixels = accuracy.PixelPipeline(data).eval()(torch.stack([judged.load(n) for n in judged.numbers]))
        assert (loaded.model(pixels).argmax(1) == judged.labels).all()
    gone = LoadedModel(
        loaded.model, "classify", CLASSES, DataConfig(path=str(tmp_path / "gone")), "a run", recipe=Recipe()
    )
    with pytest.raises(ValueError, match=r"not at .*gone any more.*--data FOLDER"):
        find_images(gone, None)
    with pytest.raises(ValueError, match="--data FOLDER"):
        find_images(loaded, None)


def test_images_that_a_run_left_out_are_left_out_again(loaded: LoadedModel, folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "photos")
    for path in sorted((tmp_path / "photos").rglob("*.png"))[::3]:
        path.write_bytes(path.read_bytes()[:40])
    good = len(list(folder.rglob("*.png"))) - len(list(folder.rglob("*.png"))[::3])
    data = DataConfig(path=str(tmp_path / "photos"), img_size=16, crop_pct=1.0, val_fraction=0.5, on_bad_image="skip")
    run = LoadedModel(loaded.model, "classify", CLASSES, data, "a run", recipe=Recipe(data=data))
    parts = find_images(run, None)
    assert sum(len(part.numbers) for part in parts) == good
    for part in parts:
        assert all(part.load(i).shape[0] == 3 for i in part.numbers)


def test_images_without_labels_and_few_of_them(loaded: LoadedModel, folder: Path, tmp_path: Path):
    for i, path in enumerate(sorted(folder.rglob("*.png"))[:6]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes())
    calibration, judged = find_images(loaded, tmp_path)
    assert calibration is judged and judged.what == f"all 6 images of {tmp_path}" and judged.labels is None
    with pytest.raises(FileNotFoundError):
        find_images(loaded, tmp_path / "nothing")


def test_answers_of_tables():
    targets = TableTargets(
        (Output("kind", "class", ("a", "b")), Output("tags", "labels", ("x", "y")), Output("n", "number"))
    )
    feed = Feed(Images(lambda i: torch.zeros(3, 16, 16, dtype=torch.uint8), range(2), "images"), DATA, 2, False, False)
    expected = torch.tensor([[1.0, 0.0, 2.0, -2.0, 0.5], [0.0, 1.0, -2.0, 2.0, -0.5]])
    judge = Judge(feed, [expected], targets, 1.0)
    assert judge.score(lambda x: expected).agreement == 1
    given = expected.clone()
    given[0] = torch.tensor([0.0, 1.0, 2.0, 2.0, 0.7])  # another class, one label more, another number
    assert judge.score(lambda x: given).agreement == pytest.approx((1 / 4 + 1) / 2)


def test_layers_are_named_as_in_the_model(spoilt: LoadedModel, folder: Path, tmp_path: Path):
    """Also where the preprocessing is around the model, whose matrices are no layers."""
    path = tmp_path / "pixels.onnx"
    volo.export(spoilt, path, with_preprocessing=True)
    names = set(nodes_of_layers(onnx.load(path), products=True))
    modules = {name for name, _ in spoilt.model.named_modules()}
    assert VICTIM in names and names <= modules
    report = volo.export(
        spoilt, path, dtype="int8", int8="static", with_preprocessing=True, data=folder, max_drop=10, overwrite=True
    )
    assert report.values["int8"]["left_in_floating_point"] == [VICTIM]


def test_a_page_gives_its_tokens_too(spoilt: LoadedModel, folder: Path, tmp_path: Path):
    for name in (RUNTIME, WASM):
        (tmp_path / name).write_bytes(b"a runtime")
    told = volo.export(
        spoilt,
        tmp_path / "page.html",
        format="html",
        dtype="int8",
        int8="static",
        data=folder,
        max_drop=10,
        web_runtime=tmp_path,
    ).values
    assert told["description"]["outputs"] == ["probabilities", "tokens"]
    assert told["int8"]["left_in_floating_point"] == [VICTIM] and told["int8"]["top1"] >= 90


def test_several_outputs_are_judged_by_the_first(loaded: LoadedModel, folder: Path, tmp_path: Path):
    path = tmp_path / "both.onnx"
    how = {"dtype": "int8", "data": folder, "max_drop": 50, "img_size": 16}
    report = volo.export(WithTokens(loaded.model), path, **how)  # type: ignore[arg-type]
    assert open_exported(path).outputs == ("logits", "tokens") and report.values["int8"]["agreement"] >= 50
    backwards = Reversed(WithTokens(loaded.model))
    with pytest.raises(ValueError, match="judged by the classes in the first output.*tokens, logits"):
        volo.export(backwards, tmp_path / "x.onnx", **how)  # type: ignore[arg-type]


class Reversed(nn.Module):
    """The outputs of `model` in the other order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(reversed(self.model(images).items()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"int8": "static"}, "--dtype int8"),
        ({"int8": "dynamic", "dtype": "int8", "format": "openvino"}, "static"),
        ({"dtype": "int8", "max_drop": -1.0}, "from 0 to 100"),
        ({"dtype": "int8", "max_changed": 101.0}, "max_changed is a percentage, from 0 to 100; given: 101"),
        ({"max_changed": 1.0}, "max_changed is about int8, and dtype is 'fp32'"),
        ({"dtype": "int8", "with_preprocessing": True, "dynamic": (), "batch_size": 2}, "one at a time"),
        ({"dtype": "int8", "dynamic": (), "batch_size": 30}, "batches of 30"),
    ],
)
def test_refusals(loaded: LoadedModel, options: dict[str, object], message: str, folder: Path, tmp_path: Path):
    if options.get("format") == "openvino":
        pytest.importorskip("openvino")
    out = tmp_path / ("x.xml" if options.get("format") == "openvino" else "x.onnx")
    with pytest.raises(ValueError, match=message):
        volo.export(loaded, out, data=folder, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_segmenter_is_judged_by_its_pixels(folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    model = create_segmenter("fpn_volo_nano", num_classes=3, img_size=32, **TINY).eval()
    segmenter = LoadedModel(model, "segment", ("a", "b", "c"), DataConfig(img_size=(32, 48)), "a test")
    out = tmp_path / "segmenter.onnx"
    told = volo.export(segmenter, out, dtype="int8", int8="static", data=folder, max_drop=50).values["int8"]
    assert "top1" not in told and 50 <= told["agreement"] < 100
    assert {name.partition(".")[0] for name in nodes_of_layers(onnx.load(out), products=True)} >= {"backbone"}


@pytest.mark.slow
def test_openvino(loaded: LoadedModel, spoilt: LoadedModel, folder: Path, tmp_path: Path):
    pytest.importorskip("nncf")
    how = {"format": "openvino", "dtype": "int8", "data": folder, "max_drop": 10}
    good, bad = (
        volo.export(model, tmp_path / f"{name}.xml", **how)  # type: ignore[arg-type]
        for name, model in (("good", loaded), ("bad", spoilt))
    )
    assert VICTIM not in good.values["int8"]["left_in_floating_point"]
    assert VICTIM in bad.values["int8"]["left_in_floating_point"] and bad.values["int8"]["top1"] >= 90
