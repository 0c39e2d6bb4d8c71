"""Linear layers through oneDNN compute what torch.nn.functional.linear computes, and step aside where they cannot."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import volo
from volo.layers import Mlp
from volo.models.fuse import FastLinear, PackedLinear, pack_linear_layers, use_training_kernels
from volo.ops import linear as linear_ops
from volo.ops.linear import MIN_ROWS, linear

pytestmark = pytest.mark.skipif(not linear_ops._dtypes, reason="PyTorch has no oneDNN for this processor")


@pytest.fixture(autouse=True)
def taken(monkeypatch) -> list[str]:
    """What went through oneDNN; on every x86, Intel's and those without AVX-512 too."""
    calls: list[str] = []
    plain = linear_ops._multiply
    monkeypatch.setattr(linear_ops, "_mkl_is_slow", True)
    monkeypatch.setattr(linear_ops, "_packing_pays", dict.fromkeys(linear_ops._dtypes, True))
    monkeypatch.setattr(linear_ops, "_multiply", lambda *args: calls.append("multiply") or plain(*args))
    return calls


def inputs(has_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 7, 24), (40, 24), (40,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_() if has_bias else None


def use_fast(layer: nn.Linear) -> nn.Linear:
    use_training_kernels(layer)
    assert type(layer) is FastLinear
    return layer


@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients(taken, has_bias):
    grad = torch.randn(3, 5, 7, 40)
    results = []
    for function in (linear, F.linear):
        tensors = inputs(has_bias)
        out = function(*tensors)
        out.backward(grad)
        results.append([out.detach(), *(t.grad for t in tensors if t is not None)])
    assert taken == ["multiply"] * 2  # forward, and the gradient of x
    for mine, expected in zip(*results):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-5)


def test_gradients_that_nobody_wants_are_not_computed(taken):
    x, weight, bias = inputs()
    linear(x.detach(), weight, bias).sum().backward()
    assert taken == ["multiply"] and weight.grad is not None
    linear(x, weight.detach(), None).sum().backward()
    assert x.grad is not None


def test_second_derivative():
    x, weight, bias = inputs()

    def penalty(function) -> Tensor:
        (grad,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(linear), penalty(F.linear), atol=1.0, rtol=1e-4)


def test_everything_else_goes_to_pytorch(taken):
    x, weight, bias = (t.detach() for t in inputs())
    few = x.reshape(-1, 24)[: MIN_ROWS - 1]
    for given in (few, x.double(), x[0, 0, 0]):
        dtype = given.dtype
        torch.testing.assert_close(
            linear(given, weight.to(dtype), bias.to(dtype)), F.linear(given, weight.to(dtype), bias.to(dtype))
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x[:0], weight, bias).shape == (0, 5, 7, 40)
    assert linear(x.to("meta"), weight.to("meta"), None).shape == (3, 5, 7, 40)
    many = torch.vmap(lambda one: linear(one, weight, bias))(x)
    torch.testing.assert_close(many, F.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[..., :23].contiguous(), weight, bias)
    exported = torch.export.export(use_fast(nn.Linear(24, 40)), (x,))
    assert all(str(n.target).startswith("aten.") for n in exported.graph.nodes if n.op == "call_function")
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    assert taken == []


def test_packed_layers_share_their_parameters_and_keep_the_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(24, 72), nn.Linear(24, 10, bias=False)).eval()
    parameters = dict(model.named_parameters())
    x = torch.randn(2, 3, 5, 24)
    with torch.inference_mode():
        expected = model(x)
        pack_linear_layers(model)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert all(isinstance(m, PackedLinear) for m in model.modules() if isinstance(m, nn.Linear))
    assert isinstance(model[0].act, nn.Identity) and model[0].fc1.gelu and not model[0].fc2.gelu
    assert all(m._packed._made is not None for m in model.modules() if isinstance(m, PackedLinear))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)  # with gradients: a plain Linear and GELU
    pack_linear_layers(model)  # once more changes nothing
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}


def test_a_packed_layer_follows_its_weight():
    layer = PackedLinear(nn.Linear(24, 10))
    x = torch.randn(6, 24)
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * first - layer.bias)
        layer.load_state_dict({"weight": torch.zeros(10, 24), "bias": torch.ones(10)})
        assert torch.equal(layer(x), torch.ones(6, 10))
        layer.double()
        assert layer(x.double()).dtype == torch.float64
        layer.bfloat16()
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_packed_layer_can_be_copied_pickled_compiled_and_exported():
    layer = PackedLinear(nn.Linear(24, 10), gelu=True).eval()
    x = torch.randn(6, 24)
    with torch.no_grad():
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(twin(x), expected)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
        exported = torch.export.export(layer, (x,))
    assert all(str(n.target).startswith("aten.") for n in exported.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(exported.module()(x), expected)


@pytest.mark.parametrize("write", ["mul_", "data.mul_", "data.copy_", "data = ", "vector_to_parameters"])
def test_a_packed_layer_sees_every_way_to_write_a_weight(write):
    torch.manual_seed(0)
    layer, x = PackedLinear(nn.Linear(96, 288)), torch.randn(70, 96)
    with torch.no_grad():
        layer(x)
        new = torch.randn(288, 96)
        if write == "mul_":
            new = layer.weight.mul_(0.5).clone()
        elif write == "data.mul_":
            new = layer.weight.data.mul_(0.5).clone()
        elif write == "data.copy_":
            layer.weight.data.copy_(new)
        elif write == "data = ":
            layer.weight.data = new
        else:
            torch.nn.utils.vector_to_parameters(new.flatten(), [layer.weight])
        torch.testing.assert_close(layer(x), F.linear(x, new, layer.bias), atol=1e-4, rtol=1e-4)


def test_only_plain_layers_are_packed():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = nn.Sequential(Doubled(24, 24), nn.Linear(24, 24)), torch.randn(70, 24)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    seen: list[int] = []
    model.append(nn.Linear(24, 8))
    model[2].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        expected = model(x)
        pack_linear_layers(model)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert [isinstance(layer, PackedLinear) for layer in model] == [False, False, True] and seen == [1, 1]


def test_models_are_built_of_plain_layers_that_tools_find():
    model = volo.create_model("volo_nano")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears and all(type(m) is nn.Linear for m in linears)
    assert all(type(m) is nn.GELU for m in model.modules() if isinstance(m, nn.GELU))
    names, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    use_training_kernels(model)
    assert all(type(m) is FastLinear for m in linears)
    assert list(model.state_dict()) == names and {id(p) for p in model.parameters()} == parameters


@pytest.mark.parametrize("is_slow", [True, False], ids=["other makers", "Intel"])
def test_graphs_do_not_depend_on_the_processor(monkeypatch, is_slow):
    """A free batch size stays free, in exported and in compiled graphs, whatever the maker of the processor."""
    monkeypatch.setattr(linear_ops, "_mkl_is_slow", is_slow)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    use_training_kernels(model)
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(model, (torch.randn(2, 5, 24),), dynamic_shapes=({0: batch},))
    assert [str(bounds) for bounds in program.range_constraints.values()] == ["VR[1, 512]"]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    with torch.no_grad():
        for count in (2, 3, 8, 40, 64):
            compiled(torch.randn(count, 5, 24))
    assert counter.frame_count == 1


@pytest.mark.parametrize("pays", [True, False], ids=["AVX-512", "AVX2"])
def test_weights_are_packed_where_that_pays(monkeypatch, pays):
    monkeypatch.setattr(linear_ops, "_packing_pays", {torch.float32: pays})
    layer, x = nn.Linear(24, 40), torch.randn(100, 24)
    with torch.inference_mode():
        expected = F.gelu(layer(x))
        packed = PackedLinear(layer, gelu=True)
        torch.testing.assert_close(packed(x), expected)
    assert (packed._packed._made is not None) == pays
