"""Models to files and back: ours, a trained one, timm's, one built as MiVOLO is, a segmenter, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import segmenter_recipe
from torch import Tensor, nn

import volo
from volo.cli.main import main
from volo.config import DataConfig
from volo.deploy.check import made_images
from volo.deploy.export import KINDS
from volo.deploy.onnx_file import OPSETS, largest_rank
from volo.inference.exported import named_outputs, open_exported
from volo.inference.model_source import LoadedModel, load
from volo.models.factory import create_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
timm = pytest.importorskip("timm")
openvino = pytest.importorskip("openvino")

TOLERANCE = 1e-4
"""Of the largest logit."""
TINY = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4), "stem_hidden_dim": 8}
D1 = {"layers": (4, 4, 8, 2), "embed_dims": (192, 384, 384, 384), "num_heads": (6, 12, 12, 12)}
FORMATS = [("onnx", 17), ("onnx", 20), ("onnx", OPSETS[-1]), ("openvino", None), ("torch", None)]


def timms(img_size: int, num_classes: int, **config: Any) -> nn.Module:
    from timm.models.volo import VOLO

    torch.manual_seed(0)
    model = VOLO(img_size=img_size, num_classes=num_classes, downsamples=(True, False, False, False), **config).eval()
    return with_answers(model)


def with_answers(model: nn.Module) -> nn.Module:
    """The model with weights so large that images get different answers, as those of trained ones do."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.2, 0.5)
    return model


class Looking(nn.Module):
    """Tokens of one image that look at those of another: bottleneck attention, positions relative to one another."""

    def __init__(self, dim: int, feat_size: tuple[int, int]) -> None:
        super().__init__()
        from timm.layers.bottleneck_attn import PosEmbedRel

        self.q = nn.Conv2d(dim, dim, 1, bias=False)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.scale = dim**-0.5
        self.positions = PosEmbedRel(feat_size, dim, self.scale)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q = self.q(x).flatten(2).transpose(1, 2)
        k, v = self.kv(other).flatten(2).chunk(2, dim=1)
        attn = (self.scale * (q @ k) + self.positions(q)).softmax(dim=-1)
        return (v @ attn.transpose(1, 2)).reshape(x.shape)


class FaceAndBody(nn.Module):
    """Two images side by side in six channels, a stem for each; each looks at the other, and an MLP makes one of both
    (arXiv 2307.04616, section 3.2)."""

    def __init__(self, img_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        from timm.layers import Mlp
        from timm.models.volo import PatchEmbed

        self.stems = nn.ModuleList(
            PatchEmbed(img_size, True, 2, patch_size=8, hidden_dim=hidden_dim, embed_dim=dim) for _ in range(2)
        )
        self.looking = nn.ModuleList(Looking(dim, (img_size // 8, img_size // 8)) for _ in range(2))
        self.norm = nn.LayerNorm(2 * dim)
        self.join = Mlp(2 * dim, dim, dim)

    def forward(self, images: Tensor) -> Tensor:
        face, body = (stem(image) for stem, image in zip(self.stems, images.chunk(2, dim=1)))
        both = torch.cat([self.looking[0](face, body), self.looking[1](body, face)], dim=1).permute(0, 2, 3, 1)
        return self.join(self.norm(both)).permute(0, 3, 1, 2)


class AgeAndGender(nn.Module):
    """Built as MiVOLO is: timm's VOLO behind the stem above, its three outputs read as two logits and a number."""

    def __init__(self, img_size: int, **config: Any) -> None:
        super().__init__()
        self.volo = timms(img_size, 3, **config)
        self.volo.patch_embed = FaceAndBody(img_size, config["embed_dims"][0], config.get("stem_hidden_dim", 64))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        given = self.volo(images)
        return {"gender": given[:, :2], "age": given[:, 2:]}


def mivolo(img_size: int, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_answers(AgeAndGender(img_size, **config).eval())


def ours(img_size: int) -> LoadedModel[Any]:
    torch.manual_seed(0)
    model = with_answers(create_model("volo_d1", img_size=img_size).eval())
    return LoadedModel(model, "classify", (), DataConfig(img_size=img_size), "volo_d1, random weights")


def graph_is_plain(path: Path) -> None:
    """The ONNX file passes the full checker, and holds standard operators without unfold or fold on tensors of rank 4 at
    most, all of whose shapes are known."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not {"Col2Im", "Im2Col", "ScatterND", "Einsum"} & {node.op_type for node in model.graph.node}
    assert len(model.functions) == 0
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True).graph
    known = {v.name for v in (*inferred.value_info, *inferred.output) if v.type.tensor_type.HasField("shape")}
    assert [name for node in inferred.node for name in node.output if name and name not in known] == []
    assert largest_rank(model) <= 4
    assert max((len(tensor.dims) for tensor in model.graph.initializer), default=0) <= 4


def same_answers(model: nn.Module, runs: Callable[[Tensor], Any], images: Tensor) -> None:
    with torch.inference_mode():
        expected = named_outputs(model(images))
    given = named_outputs(runs(images))
    assert list(given) == list(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(given[name], wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))
        assert torch.equal(given[name].argmax(1), wanted.argmax(1)), name


def round_trip(
    model: Any, folder: Path, kind: str, opset: int | None, sizes: list[tuple[int, int]], **how: Any
) -> Path:
    """Export `model`, and compare the file with it at batch 1 and 8, at each of `sizes`, in each runtime that takes it."""
    path = folder / f"model{KINDS[kind].ending}"
    volo.export(model, path, format=kind, opset=opset, **how)  # type: ignore[arg-type]
    module = getattr(model, "model", model)
    exported = open_exported(path)
    runs: list[Callable[[Tensor], Any]] = [exported]
    if kind == "onnx":
        graph_is_plain(path)
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def in_openvino(images: Tensor) -> dict[str, Tensor]:
            given = compiled(images.numpy())
            return {name: torch.from_numpy(given[name]) for name in exported.outputs}

        runs.append(in_openvino)
    for height, width in sizes:
        images = made_images(8, height, width, how.get("in_chans", 3))
        for run in runs:
            same_answers(module, run, images[:1])
            same_answers(module, run, images)
    return path


def test_graphs_of_any_depth_of_hiding_are_found_out(tmp_path: Path):
    """`graph_is_plain` fails where it should: rank 5, and a shape that inference does not know."""
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4, 5])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["five"]),
        helper.make_node("Squeeze", ["five", "axes"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "five", [x], [y], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "five.onnx")
    with pytest.raises(AssertionError):
        graph_is_plain(tmp_path / "five.onnx")


@pytest.mark.parametrize("kind, opset", [("onnx", 17), ("openvino", None)])
def test_built_as_mivolo_is(kind: str, opset: int | None, tmp_path: Path):
    model = mivolo(32, **TINY)
    path = round_trip(model, tmp_path, kind, opset, [(32, 32)], img_size=32, in_chans=6)
    with pytest.raises(ValueError, match="takes 6 channels and gives gender, age"):
        load(path)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["gender", "age"]


def test_timms_needs_no_preparation(tmp_path: Path):
    model = timms(32, 5, **TINY)
    before = [type(module).__name__ for module in model.modules()]
    round_trip(model, tmp_path, "onnx", OPSETS[-1], [(32, 32)], img_size=32)
    assert [type(module).__name__ for module in model.modules()] == before


def test_what_is_no_classifier_is_refused(tmp_path: Path):
    class Strange(nn.Module):
        def forward(self, images: Tensor) -> str:
            return "a cat"

    with pytest.raises(ValueError, match=r"Strange does not map images 1 x 3 x 16 x 16 .* returns str"):
        volo.export(Strange(), tmp_path / "x.onnx", img_size=16)
    with pytest.raises(ValueError, match=r"AgeAndGender does not map images 1 x 3 x 32 x 32.*in_chans"):
        volo.export(mivolo(32, **TINY), tmp_path / "x.onnx", img_size=32)
    with pytest.raises(ValueError, match="6 channels and gives gender, age"):
        volo.export(mivolo(32, **TINY), tmp_path / "x.onnx", img_size=32, in_chans=6, with_preprocessing=True)
    with pytest.raises(ValueError, match="in_chans is for modules"):
        volo.export("volo_nano", tmp_path / "x.onnx", in_chans=6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind, opset",
    [
        ("onnx", 20),
        pytest.param("onnx", 17, marks=pytest.mark.slow),
        pytest.param("onnx", OPSETS[-1], marks=pytest.mark.slow),
        pytest.param("openvino", None, marks=pytest.mark.slow),
        pytest.param("torch", None, marks=pytest.mark.slow),
    ],
)
def test_a_trained_nano_at_two_sizes(kind: str, opset: int | None, tmp_path: Path):
    loaded = volo.load("volo_nano")
    # 16 is the multiple of its sizes; 80 x 48 is not square.
    round_trip(loaded, tmp_path, kind, opset, [(64, 64), (80, 48)], dynamic=("batch", "size"))


@pytest.mark.slow
@pytest.mark.parametrize("kind, opset", FORMATS)
@pytest.mark.parametrize("what", ["ours", "timm", "mivolo"])
def test_as_large_as_d1(what: str, kind: str, opset: int | None, tmp_path: Path):
    if what == "ours":
        round_trip(ours(224), tmp_path, kind, opset, [(224, 224), (192, 256)], dynamic=("batch", "size"))
    elif what == "timm":
        model = with_answers(timm.create_model("volo_d1_224").eval())
        round_trip(model, tmp_path, kind, opset, [(224, 224)], img_size=224)
    else:
        round_trip(mivolo(224, **D1), tmp_path, kind, opset, [(224, 224)], img_size=224, in_chans=6)


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose segmenter tells sky, ground and box apart."""
    folder = tmp_path_factory.mktemp("segmenter")
    (folder / "scenes.toml").write_text(segmenter_recipe(32, 48))
    words = [str(folder / "scenes.toml"), "--data", str(scenes), "--out", str(folder / "run"), "--quiet"]
    assert main(["train", *words]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "kind, opset",
    [form if form == ("onnx", 20) else pytest.param(*form, marks=pytest.mark.slow) for form in FORMATS],
)
def test_a_trained_segmenter_by_windows(
    kind: str, opset: int | None, trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = round_trip(load(trained), tmp_path, kind, opset, [(32, 48)])
    window = ["--window", "32", "48"]
    pictures = str(scenes / "images" / "test")
    masks, scores = [], []
    for name, model in (("before", trained), ("after", path)):
        capsys.readouterr()
        assert main(["evaluate", str(model), "--data", str(scenes), "--split", "test", *window, "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["miou"])
        out = tmp_path / name
        assert main(["segment", str(model), pictures, "--out", str(out), *window]) == 0
        masks.append([np.asarray(Image.open(mask)) for mask in sorted(out.glob("[0-9][0-9].png"))])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] > 0.2
    assert len(masks[0]) == len(masks[1]) > 0
    for before, after in zip(*masks):
        assert len(np.unique(before)) > 1 and (before == after).mean() > 0.999
    # Without a word about windows, those of the file's size are taken.
    capsys.readouterr()
    assert main(["evaluate", str(path), "--data", str(scenes), "--split", "test", "--json"]) == 0
    assert main(["segment", str(path), pictures, "--out", str(tmp_path / "alone")]) == 0
