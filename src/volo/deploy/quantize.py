"""Ways to an int8 model, each with layers that are left in floating point, named as the modules of the model are.

| way | activations | runs in |
|---|---|---|
| dynamic | their range is measured while the model runs; matrix products alone | ONNX Runtime |
| static | their range is measured once, on images (QDQ) | ONNX Runtime, OpenVINO (by NNCF) |
| symmetric | the same, with every zero point at 0 and biases in float | TensorRT, ONNX Runtime |

For ONNX Runtime weights take 7 of the 8 bits. Processors with AVX2 or AVX-512 but without VNNI add two products in 16 bits,
which weights of 8 bits overflow: on such a one a classifier of photos fell from 96.1 to 80.4 %, and with 7 bits to 95.4.

Which layers to leave in floating point is decided in `volo.deploy.accuracy`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from volo.inference.exported import Run, onnx_session, openvino_session

if TYPE_CHECKING:
    import onnx
    import openvino

Way = Literal["dynamic", "static", "symmetric"]
WAYS: dict[str, tuple[Way, ...]] = {
    "onnx": ("dynamic", "static", "symmetric"),
    "html": ("dynamic", "static"),
    "openvino": ("static",),
}
"""By format, the default first."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter writes, into every node, the modules it came from."""


class Quantizer(Protocol):
    """One way for one model."""

    layers: tuple[str, ...]
    """All that can be quantised, in the order of the graph."""

    def quantize(self, keep: Collection[str] = ()) -> Any:
        """The model in int8, but for the layers in `keep`."""

    def trial(self, keep: Collection[str]) -> Run:
        """The same, ready to run; it may be measured a little more coarsely if that is much quicker."""


def nodes_of_layers(model: onnx.ModelProto, *, products: bool) -> dict[str, list[str]]:
    """Names of the nodes that multiply, by the module they came from. `products`: also those of two activations, which
    belong to the attention module around them. What stands outside every module (preprocessing) is left out."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inside = ""  # as in `volo.deploy.program.WithPreprocessing`, and in `WithTokens` inside it
    if model.graph.input[0].name == "pixels":
        inside = "model.model." if [output.name for output in model.graph.output][1:] == ["tokens"] else "model."
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or (node.input[1] not in constants and not products):
            continue
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        *modules, _ = ast.literal_eval(scopes) or [""]  # the last entry is the operation itself
        if modules and modules[-1].startswith(inside) and modules[-1] != inside:
            found.setdefault(modules[-1].removeprefix(inside), []).append(node.name)
    return found


class Dynamic:
    """Weights of matrix products as int8, a scale for each column; activations are quantised while the model runs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
        nodes = nodes_of_layers(model, products=False)
        self.nodes = {layer: names for layer, names in nodes.items() if not convolutions & set(names)}
        self.layers = tuple(self.nodes)

    def quantize(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        kept = [name for layer in keep for name in self.nodes[layer]]
        with tempfile.TemporaryDirectory() as folder, _quiet():
            plain, quantized = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
            onnx.save(self.model, plain)
            quantize_dynamic(
                plain,
                quantized,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=kept + [f"{name}_MatMul" for name in kept],  # what it makes of a Gemm
            )
            return onnx.load(quantized)

    def trial(self, keep: Collection[str]) -> Run:
        return onnx_session(self.quantize(keep).SerializeToString())[0]


class Static:
    """Weights and activations as int8 between QuantizeLinear and DequantizeLinear, in ranges measured once on `inputs`.

    `symmetric`: as TensorRT takes it. All zero points are 0, biases stay float (it has no int32 ones), and so do the
    results of layers, which it recommends. `products`: as OpenVINO does, quantise products of two activations, too.
    """

    def __init__(
        self, model: onnx.ModelProto, inputs: Iterable[np.ndarray], *, symmetric: bool = False, products: bool = False
    ) -> None:
        import onnx
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        # Shapes are inferred here, since `quant_pre_process`, which would do it, stumbles over these graphs.
        self.model, self.symmetric = onnx.shape_inference.infer_shapes(model), symmetric
        self.for_openvino = products
        self.nodes = nodes_of_layers(model, products=products)
        self.layers = tuple(self.nodes)
        name = model.graph.input[0].name
        feed = iter([{name: x} for x in inputs])
        with tempfile.TemporaryDirectory() as folder, _quiet():
            plain = Path(folder, "plain.onnx")
            onnx.save(self.model, plain)
            calibrator = create_calibrator(
                plain,
                ["Conv", "MatMul", "Gemm"],
                augmented_model_path=str(Path(folder, "watched.onnx")),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"symmetric": symmetric},
            )
            calibrator.collect_data(_Feed(feed))
            self.ranges = calibrator.compute_data()

    def quantize(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        quantized = [name for layer, names in self.nodes.items() if layer not in keep for name in names]
        types = ["Conv", "MatMul", "Gemm"]
        options: dict[str, Any] = {"WeightSymmetric": True}
        if self.symmetric:
            options |= {
                "ActivationSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": types,
            }
        activations = QuantType.QInt8 if self.symmetric else QuantType.QUInt8
        if not quantized:  # an empty list would mean all of them
            return copy.deepcopy(self.model)
        with _quiet():
            quantizer = QDQQuantizer(
                copy.deepcopy(self.model),
                True,  # a scale for each channel of the weights
                not self.for_openvino,  # 7 bits
                QuantType.QInt8,
                activations,
                self.ranges,
                quantized,
                [],
                types,
                options,
            )
            quantizer.quantize_model()
        return quantizer.model.model

    def trial(self, keep: Collection[str]) -> Run:
        return onnx_session(self.quantize(keep).SerializeToString())[0]


class Nncf:
    """An OpenVINO model with int8 weights and activations, calibrated on `inputs` by NNCF.

    NNCF takes from seconds to minutes for each model. Layers are therefore tried as `Static` quantises the ONNX model that
    it is made of, in OpenVINO: what a layer loses there, its kernels being wrong included, OpenVINO alone shows.
    """

    def __init__(self, model: onnx.ModelProto, openvino_model: openvino.Model, inputs: Iterable[np.ndarray]) -> None:
        self.source, self.model, self.inputs = model, openvino_model, list(inputs)
        self.nodes = nodes_of_layers(model, products=True)
        self.layers = tuple(self.nodes)
        # OpenVINO keeps the names of nodes, and splits those with a bias in two.
        its = [op.get_friendly_name() for op in openvino_model.get_ordered_ops()]
        self._operations = {
            name: [found for found in its if found in (name, f"{name}/WithoutBiases")]
            for name in (node.name for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm"))
        }
        self._static: Static | None = None

    def quantize(self, keep: Collection[str] = ()) -> openvino.Model:
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        quantized = {name for layer, names in self.nodes.items() if layer not in keep for name in names}
        ignored = [op for name, ops in self._operations.items() if name not in quantized for op in ops]
        with contextlib.redirect_stdout(io.StringIO()):  # its bars
            return nncf.quantize(
                self.model.clone(),
                nncf.Dataset(self.inputs),
                subset_size=len(self.inputs),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
            )

    def trial(self, keep: Collection[str]) -> Run:
        import openvino

        if self._static is None:
            self._static = Static(self.source, self.inputs, products=True)
        quantized = self._static.quantize(keep).SerializeToString()
        return openvino_session(openvino.Core().read_model(quantized), "int8")


class _Feed:
    """What ONNX Runtime's calibration reads."""

    def __init__(self, inputs: Iterable[dict[str, np.ndarray]]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime recommends its preprocessing, on the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
