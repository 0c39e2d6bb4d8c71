"""The fused CPU kernel: numbers, memory, threads, and everything of PyTorch that must see it as an operator."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import volo
from volo.ops import cpu_kernel
from volo.ops.outlook_attention import choose_backend, outlook_attention, window_grid
from volo.ops.reference import outlook_attention_reference

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
D1 = (6, 32, 3, 2, 1)  # heads, head_dim, kernel_size, stride, padding of every published model's first stage

# Where there is a compiler a missing kernel is a failure: setuptools hides a failed build of an optional extension.
pytestmark = pytest.mark.skipif(
    cpu_kernel.LOAD_ERROR is not None and shutil.which("c++") is None, reason=str(cpu_kernel.LOAD_ERROR)
)


def make(
    B, H, W, heads, head_dim, K, stride, padding, dtype=torch.float32, spread=3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """value, logits, gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    h, w = window_grid(H, W, K, stride, padding)
    value, grad = torch.randn(2, B, H, W, heads, head_dim, generator=generator)
    logits = spread * torch.randn(B, h, w, heads, K * K, K * K, generator=generator)
    return value.to(dtype), logits.to(dtype), grad.to(dtype)


def fused(value: Tensor, logits: Tensor, grad: Tensor, *geometry) -> list[Tensor]:
    return [
        cpu_kernel.forward(value, logits, *geometry),
        *cpu_kernel.backward(grad, value, logits, *geometry),
    ]


def reference(value: Tensor, logits: Tensor, grad: Tensor, *geometry, dtype=torch.float64) -> list[Tensor]:
    value, logits = (x.detach().to(dtype, copy=True).requires_grad_() for x in (value, logits))
    out = outlook_attention_reference(value, logits, *geometry)
    out.backward(grad.to(dtype))
    return [out.detach(), value.grad, logits.grad]


def assert_within_budget(got: list[Tensor], value, logits, grad, *geometry) -> None:
    """error(fused) <= 2 error(eager, same dtype) + one rounding of the largest number, all against float64."""
    dtype = value.dtype
    exact = reference(value, logits, grad, *geometry)
    eager = reference(value, logits, grad, *geometry, dtype=dtype)
    for name, mine, theirs, truth in zip(("output", "grad of value", "grad of logits"), got, eager, exact):
        assert mine.dtype == dtype and mine.is_contiguous()
        if dtype == torch.float64:  # the oracle is no better
            torch.testing.assert_close(mine, truth, rtol=0, atol=1e-13)
            continue
        if truth.numel() == 0:
            continue
        error = (mine.double() - truth).abs().max().item()
        budget = 2 * (theirs.double() - truth).abs().max().item()
        # Logits of a 1 x 1 window have no gradient; what rounding leaves is measured against the terms that cancel.
        largest = max(truth.abs().max().item(), exact[0].abs().max().item() if name == "grad of logits" else 0.0)
        if name == "grad of logits" and geometry[0] == 1:
            largest = max(largest, (grad.double() * value.double()).sum(-1).abs().max().item() * geometry[3])
        assert error <= budget + torch.finfo(dtype).eps * largest, name


@pytest.fixture(params=range(3), ids=["portable", "AVX2", "AVX-512"])
def isa(request, monkeypatch) -> str:
    if request.param > cpu_kernel._library.volo_best_isa():
        pytest.skip("this processor has no such instructions")
    monkeypatch.setattr(cpu_kernel, "_isa", request.param)
    return cpu_kernel.instruction_set()


GEOMETRIES = [
    (2, 28, 28, *D1),
    (1, 27, 29, 2, 32, 3, 2, 1),
    (1, 9, 7, 3, 32, 3, 1, 1),
    (3, 5, 5, 1, 64, 3, 2, 1),
    (1, 8, 8, 2, 48, 3, 2, 0),
    (1, 7, 8, 2, 16, 3, 1, 2),
    (2, 6, 6, 2, 12, 3, 2, 1),
    (1, 6, 5, 3, 1, 3, 2, 1),
    (1, 9, 8, 2, 33, 3, 3, 1),
    (1, 12, 11, 1, 32, 3, 5, 1),
    (1, 10, 9, 2, 32, 5, 2, 2),
    (1, 8, 9, 1, 7, 5, 3, 4),
    (1, 9, 9, 1, 20, 4, 2, 3),
    (1, 9, 10, 2, 32, 2, 3, 1),
    (1, 4, 5, 2, 32, 1, 1, 0),
    (1, 8, 8, 1, 8, 7, 2, 3),
    (1, 1, 1, 2, 32, 3, 1, 1),
    (0, 4, 4, 1, 32, 3, 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_error_budget(isa, dtype):
    for geometry in GEOMETRIES:
        inputs = make(*geometry, dtype=dtype)
        call = (*geometry[5:], geometry[4] ** -0.5)
        assert_within_budget(fused(*inputs, *call), *inputs, *call)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(
        st.integers(1, 2), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 70),
        st.sampled_from([3, 3, 3, 1, 2, 4, 5]), st.integers(1, 6), st.integers(0, 4),
    ).filter(lambda g: g[7] < g[5] and min(window_grid(g[1], g[2], g[5], g[6], g[7])) >= 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_error_budget_anywhere(geometry, dtype):
    # The largest error of a few numbers is a matter of luck, of both sides': enough images that it is not.
    B, H, W, heads, head_dim = geometry[:5]
    inputs = make(max(B, -(-4096 // (H * W * heads * head_dim))), *geometry[1:], dtype=dtype)
    call = (*geometry[5:], geometry[4] ** -0.5)
    assert_within_budget(fused(*inputs, *call), *inputs, *call)


@pytest.mark.parametrize("spread", [0.0, 30.0, 200.0, 2000.0])
def test_error_budget_for_any_spread_of_logits(isa, spread):
    # From 24 / scale on, the maximum of the row is subtracted; before, nothing is.
    inputs = make(1, 9, 9, *D1, spread=spread)
    assert_within_budget(fused(*inputs, 3, 2, 1, 32**-0.5), *inputs, 3, 2, 1, 32**-0.5)
    shifted = (inputs[0], inputs[1] - 5 * spread, inputs[2])
    assert_within_budget(fused(*shifted, 3, 2, 1, 32**-0.5), *shifted, 3, 2, 1, 32**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masks_infinities_and_nan_are_those_of_softmax(isa, dtype):
    value, logits, _ = make(1, 6, 6, 1, 32, 3, 3, 0, dtype=dtype)  # windows side by side
    logits[0, 0, 0, 0, :, 3:] = -torch.inf  # masked keys
    logits[0, 0, 1, 0, 4, 2] = torch.nan
    logits[0, 1, 0, 0, 0, 0] = torch.inf
    logits[0, 1, 1, 0, 5] = -torch.inf  # nothing left
    out = cpu_kernel.forward(value, logits, 3, 3, 0, 1.0)
    expected = outlook_attention_reference(value.double(), logits.double(), 3, 3, 0, 1.0)
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps, equal_nan=True)
    assert out.isnan().any(-1).sum() == 3


def test_bfloat16_rounds_to_nearest_and_keeps_nan_and_infinity(isa):
    # One key per window with weight exactly 1: the output is the value, widened and rounded back.
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    value = every.view(1, 32, 32, 1, 64)
    out = cpu_kernel.forward(value, torch.zeros(1, 32, 32, 1, 1, 1).bfloat16(), 1, 1, 0, 1.0)
    assert torch.equal(out.isnan(), value.isnan())
    assert torch.equal(out[~out.isnan()], value[~value.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "geometry", [(1, 28, 28, *D1), (3, 9, 7, 4, 20, 5, 2, 2), (2, 3, 11, 13, 32, 3, 1, 1)], ids=str
)
def test_identical_from_run_to_run_and_for_any_number_of_threads(geometry, dtype):
    inputs = make(*geometry, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fused(*inputs, *geometry[5:], 0.2)
        for threads in (2, 3, 7, 64):
            torch.set_num_threads(threads)
            for mine, expected in zip(fused(*inputs, *geometry[5:], 0.2), one):
                assert torch.equal(mine, expected)
    finally:
        torch.set_num_threads(before)


def test_views_need_no_copy(isa):
    value, logits, grad = make(2, 9, 8, 4, 32, 3, 2, 1)
    contiguous = fused(value, logits, grad, 3, 2, 1, 0.2)
    wide = torch.randn(2, 9, 8, 3, 4, 32)
    wide[:, :, :, 1] = value
    heads_first = value.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    windows_last = logits.permute(1, 2, 0, 3, 4, 5).contiguous().permute(2, 0, 1, 3, 4, 5)
    channels_first = value.flatten(3).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).unflatten(3, (4, 32))
    transposed = logits.transpose(4, 5).contiguous().transpose(4, 5)
    for v in (wide[:, :, :, 1], heads_first, channels_first):
        for a in (windows_last, transposed, logits):
            for mine, expected in zip(fused(v, a, grad.expand_as(grad), 3, 2, 1, 0.2), contiguous):
                assert torch.equal(mine, expected)
    ones = torch.ones(()).expand_as(grad)  # what sum().backward() hands over
    for mine, expected in zip(
        cpu_kernel.backward(ones, value, logits, 3, 2, 1, 0.2),
        cpu_kernel.backward(ones.contiguous(), value, logits, 3, 2, 1, 0.2),
    ):
        assert torch.equal(mine, expected)


def test_every_element_is_written():
    # torch.empty hands out NaN: an element that the kernel forgets shows up.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for geometry in GEOMETRIES:
            for x in fused(*make(*geometry), *geometry[5:], 0.2):
                assert not x.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_memory_is_kept():
    resource = pytest.importorskip("resource")
    inputs = make(1, 8, 8, 2, 32, 3, 2, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        fused(*inputs, 3, 2, 1, 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        fused(*inputs, 3, 2, 1, 0.2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB; a leaked scratch would be 200 MiB


def test_scratch_is_under_a_percent_of_the_unfolded_values():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for B, side, heads, dtype in (
            (1, 28, 6, torch.float32),
            (8, 28, 6, torch.float32),
            (1, 56, 12, torch.float32),
            (8, 28, 6, torch.bfloat16),
            (1, 56, 12, torch.bfloat16),
        ):
            value, logits, _ = make(B, side, side, heads, 32, 3, 2, 1, dtype=dtype)
            unfolded = B * (side // 2) ** 2 * 9 * heads * 32 * value.element_size()
            for backward in (False, True):
                assert cpu_kernel.scratch_bytes(value, logits, 3, 2, 1, backward=backward) < 0.01 * unfolded
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_those_of_torch():
    code = """
import re, torch
torch.set_num_threads(3)
torch.randn(1 << 22).exp()
from pathlib import Path
from volo.ops import cpu_kernel
count = lambda: len(list(Path("/proc/self/task").iterdir()))
before = count()
cpu_kernel.forward(torch.randn(4, 28, 28, 6, 32), torch.randn(4, 14, 14, 6, 9, 9), 3, 2, 1, 0.2)
assert count() == before, (before, count())
pools = set(re.findall(r"\\S*lib(?:gomp|omp|iomp5)[^/\\s]*$", Path("/proc/self/maps").read_text(), re.M))
assert len(pools) == 1, pools
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_takes_the_kernel_and_skips_what_it_cannot_do():
    value, logits, _ = make(1, 6, 6, 2, 8, 3, 2, 1)
    assert choose_backend(value, logits, 3, 2, 1).name == "cpu"
    assert choose_backend(value.half(), logits.half(), 3, 2, 1).name == "reference"
    with pytest.raises(ValueError, match="cpu.*float32, bfloat16 and float64, not float16"):
        outlook_attention(value.half(), logits.half(), kernel_size=3, stride=2, padding=1, backend="cpu")


def test_a_kernel_that_is_missing_or_broken_says_why(tmp_path):
    library, reason = cpu_kernel._load(tmp_path / "_outlook_attention.so")
    assert library is None and "was not built" in reason
    (tmp_path / "_outlook_attention.so").write_bytes(b"not a library")
    library, reason = cpu_kernel._load(tmp_path / "_outlook_attention.so")
    assert library is None and "does not load" in reason


def test_without_the_kernel_the_reference_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu_kernel, "LOAD_ERROR", "it was not built")
    monkeypatch.setattr("volo.ops.outlook_attention._reported_fallbacks", set())
    value, logits, _ = make(1, 6, 6, 2, 8, 3, 2, 1)
    with caplog.at_level(logging.INFO, "volo"):
        for _ in range(2):
            volo.outlook_attention(value, logits, kernel_size=3, stride=2, padding=1)
    assert len(caplog.records) == 1 and "cpu: it was not built" in caplog.text


@pytest.mark.parametrize("capability, expected", [("avx2", {"AVX2", "portable"}), ("default", {"portable"})])
def test_torch_decides_the_instruction_set(capability, expected):
    code = "from volo.ops import cpu_kernel; print(cpu_kernel.instruction_set())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() in expected


# ---- as an operator of PyTorch ----


def operator(value: Tensor, logits: Tensor) -> Tensor:
    return outlook_attention(value, logits, kernel_size=3, stride=2, padding=1)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    value, logits, _ = make(2, 7, 6, 2, 16, 3, 2, 1)
    return value.requires_grad_(), logits.requires_grad_()


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def test_opcheck(inputs):
    torch.library.opcheck(torch.ops.volo.outlook_attention.default, (*inputs, 3, 2, 1, 0.2))
    grad_out = torch.randn_like(inputs[0])
    torch.library.opcheck(torch.ops.volo.outlook_attention_backward.default, (grad_out, *inputs, 3, 2, 1, 0.2))


def test_eager_call_and_op_agree(inputs):
    def op(value: Tensor, logits: Tensor) -> Tensor:
        return torch.ops.volo.outlook_attention(value, logits, 3, 2, 1, 16**-0.5)

    for mine, expected in zip(gradients(operator, *inputs), gradients(op, *inputs)):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(inputs, dynamic):
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _example: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(operator, fullgraph=True, dynamic=dynamic, backend=keep)
    for mine, expected in zip(gradients(compiled, *inputs), gradients(operator, *inputs)):
        assert torch.equal(mine, expected)
    assert [str(n.target) for n in graphs[0].graph.nodes if "outlook" in str(n.target)]
    if dynamic:
        value, logits, _ = make(3, 9, 8, 2, 16, 3, 2, 1)
        assert torch.equal(compiled(value, logits), operator(value, logits))


@pytest.mark.slow
def test_compiles_with_inductor_forward_and_backward(inputs):
    torch.compiler.reset()
    compiled = torch.compile(lambda v, a: operator(v * 2, a + 1).exp(), fullgraph=True)
    for mine, expected in zip(
        gradients(compiled, *inputs), gradients(lambda v, a: operator(v * 2, a + 1).exp(), *inputs)
    ):
        torch.testing.assert_close(mine, expected)


def test_exported_graphs_are_portable(inputs):
    class Module(torch.nn.Module):
        def forward(self, value: Tensor, logits: Tensor) -> Tensor:
            return operator(value, logits)

    arguments = tuple(x.detach() for x in inputs)
    for strict in (False, True):
        exported = torch.export.export(Module(), arguments, strict=strict)
        targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
        assert targets and all(t.startswith("aten.") for t in targets)
        torch.testing.assert_close(exported.module()(*arguments), operator(*arguments))


def test_traced_graphs_are_portable(inputs):
    arguments = tuple(x.detach() for x in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(operator, arguments, check_trace=False)
    assert "volo::" not in str(traced.graph)


def test_vmap_is_one_more_batch(inputs):
    value, logits = (x.detach() for x in inputs)
    values, many = torch.stack([value, 2 * value, value - 1]), torch.stack([logits, logits + 1, -logits])
    each = torch.stack([operator(v, a) for v, a in zip(values, many)])
    assert torch.equal(torch.vmap(operator)(values, many), each)
    assert torch.equal(torch.vmap(operator, (1, 2))(values.movedim(0, 1), many.movedim(0, 2)), each)
    shared_value = torch.vmap(operator, (None, 0))(value, many)
    assert torch.equal(shared_value, torch.stack([operator(value, a) for a in many]))

    values.requires_grad_()
    together = gradients(lambda v: torch.vmap(operator)(v, many), values)
    apart = gradients(lambda v: torch.stack([operator(x, a) for x, a in zip(v, many)]), values)
    for mine, expected in zip(together, apart):
        torch.testing.assert_close(mine, expected)


def test_transforms_of_torch_func_are_right(inputs):
    value, logits = (x.detach() for x in inputs)
    tangent = torch.randn_like(value)
    _, moved = torch.func.jvp(lambda v: operator(v, logits), (value,), (tangent,))
    torch.testing.assert_close(moved, operator(tangent, logits))  # linear in the values

    def loss(v: Tensor, a: Tensor) -> Tensor:
        return operator(v, a).square().sum()

    both = torch.func.grad(loss, argnums=(0, 1))(value, logits)
    for mine, expected in zip(both, gradients(operator, *inputs)[1:]):
        torch.testing.assert_close(mine, expected)
    per_sample = torch.vmap(torch.func.grad(lambda v, a: loss(v[None], a[None])))(value, logits)
    torch.testing.assert_close(per_sample, both[0])


def test_batched_gradients(inputs):
    out = operator(*inputs)
    several = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, inputs, several, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(several):
        for mine, expected in zip(together, torch.autograd.grad(out, inputs, one, retain_graph=True)):
            torch.testing.assert_close(mine[i], expected)


def test_gradient_of_one_input_only(inputs):
    value, logits = inputs
    both = gradients(operator, value, logits)
    torch.testing.assert_close(gradients(lambda v: operator(v, logits.detach()), value)[1], both[1])
    torch.testing.assert_close(gradients(lambda a: operator(value.detach(), a), logits)[1], both[2])


def test_activation_checkpointing(inputs):
    from torch.utils.checkpoint import checkpoint

    def checkpointed(v: Tensor, a: Tensor) -> Tensor:
        return checkpoint(operator, v, a, use_reentrant=False)

    for mine, expected in zip(gradients(checkpointed, *inputs), gradients(operator, *inputs)):
        assert torch.equal(mine, expected)


def test_fake_tensors(inputs):
    from torch._subclasses.fake_tensor import FakeTensorMode

    detached = [x.detach() for x in inputs]
    with FakeTensorMode() as mode:
        value, logits = (mode.from_tensor(x) for x in detached)
        assert operator(value, logits).shape == value.shape


def test_a_small_call_costs_microseconds():
    value, logits, _ = make(1, 4, 4, 1, 16, 3, 2, 1)
    taken = []
    for _ in range(300):
        start = time.perf_counter()
        cpu_kernel.forward(value, logits, 3, 2, 1, 0.25)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 100e-6  # 10 on a quiet machine


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or not SOURCES.is_dir(), reason="no C++ compiler or no sources")
@pytest.mark.timeout(1800)
def test_clean_under_address_sanitizer(tmp_path):
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fopenmp",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover",
    ]
    sets = {
        "portable": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    }
    objects = []
    for source in [*(f"outlook_{name}" for name in sets), "memcheck"]:
        own = sets.get(source.removeprefix("outlook_"), [])
        objects.append(str(tmp_path / f"{source}.o"))
        subprocess.run(["c++", *flags, *own, "-c", str(SOURCES / f"{source}.cpp"), "-o", objects[-1]], check=True)
    subprocess.run(["c++", *flags, *objects, "-o", str(tmp_path / "memcheck")], check=True)
    run = subprocess.run([str(tmp_path / "memcheck")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("cases\n")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or not SOURCES.is_dir(), reason="no C++ compiler or no sources")
def test_a_wheel_carries_the_kernel_for_every_python(tmp_path):
    root = SOURCES.parent
    for name in ("src", "csrc", "recipes"):
        shutil.copytree(root / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, tmp_path / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "source")], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "from volo.ops import cpu_kernel; print(cpu_kernel.LIBRARY, cpu_kernel.LOAD_ERROR)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == [str(tmp_path / "installed" / "volo" / "ops" / "_outlook_attention.so"), "None"]
