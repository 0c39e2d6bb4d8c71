"""The fused CPU kernels (`csrc/`): finds the library that was built at installation, and calls it through ctypes.

The library has a plain C interface and knows neither PyTorch nor Python. Its threads are OpenMP's, and because torch is
imported first they are the very threads that PyTorch computes with; `torch.set_num_threads` holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_outlook_attention.so")
INTERFACE_VERSION = 4  # of the structs OutlookCall, AttentionCall and GeluCall in csrc/*.h

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_ISA_NAMES = ("portable", "AVX2", "AVX-512")

_Call = ctypes.c_int64 * 31  # struct OutlookCall
_AttentionCall = ctypes.c_int64 * 15  # struct AttentionCall
_GeluCall = ctypes.c_int64 * 7  # struct GeluCall


def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if not path.is_file():
        return None, (
            f"it was not built (no {path.name} beside {Path(__file__).name}); install again where a C++ compiler is found"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.volo_interface_version
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}; install again on this machine"
    version.restype = ctypes.c_int64
    if version() != INTERFACE_VERSION:
        return (
            None,
            f"{path.name} was built from other sources (interface {version()}, expected {INTERFACE_VERSION}); build again",
        )
    library.volo_best_isa.restype = ctypes.c_int64
    for function in (
        library.volo_outlook_forward,
        library.volo_outlook_backward,
        library.volo_attention_forward,
        library.volo_attention_backward,
    ):
        function.argtypes = [ctypes.c_void_p, ctypes.c_double]
        function.restype = ctypes.c_int
    library.volo_gelu_backward.argtypes = [ctypes.c_void_p]
    library.volo_gelu_backward.restype = None
    return library, None


def _choose_isa(library: ctypes.CDLL) -> int:
    """The best set that binary and processor have, and that PyTorch uses (ATEN_CPU_CAPABILITY lowers both)."""
    capability = torch.backends.cpu.get_cpu_capability()
    allowed = 2 if capability.startswith("AVX512") else 1 if capability == "AVX2" else 0
    return min(allowed, library.volo_best_isa())


_library: Any
_library, LOAD_ERROR = _load(LIBRARY)
_isa = 0 if _library is None else _choose_isa(_library)


def instruction_set() -> str:
    """Name of the code that runs: "AVX-512", "AVX2" or "portable"."""
    return _ISA_NAMES[_isa]


def why_not(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> str | None:
    """None where the kernel can compute this call, otherwise the reason."""
    if value.device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {value.device.type}"
    if LOAD_ERROR is not None:
        return LOAD_ERROR
    if value.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float64, not {str(value.dtype).removeprefix('torch.')}"
    return None


def forward(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """The operator without autograd; shapes as in `volo.ops.outlook_attention`. Returns a contiguous tensor."""
    value, logits = _dense_tokens(value), _dense_windows(logits)
    out = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    _run(_library.volo_outlook_forward, value, logits, kernel_size, stride, padding, scale, out)
    return out


def backward(
    grad_out: Tensor, value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `value` and `logits`, contiguous, from that of the output; the softmax is computed again."""
    value, logits, grad_out = _dense_tokens(value), _dense_windows(logits), _dense_tokens(grad_out)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    _run(
        _library.volo_outlook_backward, value, logits, kernel_size, stride, padding, scale,
        grad_value, grad_out, grad_logits,
    )  # fmt: skip
    return grad_value, grad_logits


def scratch_bytes(
    value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, *, backward: bool = False
) -> int:
    """Memory that such a call takes beyond inputs and outputs, all threads together."""
    function = _library.volo_outlook_backward if backward else _library.volo_outlook_forward
    answer = ctypes.c_int64()
    _run(function, value, logits, kernel_size, stride, padding, 1.0, value, measure=answer)
    return answer.value


def _dense_tokens(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense_windows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _run(
    function: Callable[[ctypes.Array[ctypes.c_int64], float], int],
    value: Tensor,
    logits: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    result: Tensor,
    grad_out: Tensor | None = None,
    grad_logits: Tensor | None = None,
    measure: ctypes.c_int64 | None = None,
) -> None:
    gradients: tuple[int, ...] = (0,) * 6
    if grad_out is not None and grad_logits is not None:
        gradients = (grad_out.data_ptr(), *grad_out.stride()[:4], grad_logits.data_ptr())
    call = _Call(
        _DTYPES[value.dtype], _isa, torch.get_num_threads(), *value.shape, *logits.shape[1:3],
        kernel_size, stride, padding, value.data_ptr(), logits.data_ptr(), result.data_ptr(),
        *value.stride()[:4], *logits.stride()[:4], *gradients, 0 if measure is None else ctypes.addressof(measure),
    )  # fmt: skip
    if function(call, scale):
        raise MemoryError("outlook attention: no memory for the scratch of the CPU kernel")


# ---- self-attention ----


def attention_why_not(qkv: Tensor) -> str | None:
    """None where the kernel can compute self-attention of `qkv`, otherwise the reason."""
    return _single_why_not(qkv)


def _single_why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it computes on the CPU, the tensor is on {x.device.type}"
    if LOAD_ERROR is not None:
        return LOAD_ERROR
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    return None


def attention_forward(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention without autograd; shapes as in `volo.ops.self_attention`. Returns a contiguous tensor."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = torch.empty(B, N, C, dtype=qkv.dtype, device="cpu")
    _run_attention(_library.volo_attention_forward, qkv, num_heads, out)
    return out


def attention_backward(grad_out: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    """Gradient of `qkv`, contiguous, from that of the output; the softmax is computed again."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device="cpu")
    _run_attention(_library.volo_attention_backward, qkv, num_heads, grad_qkv, grad_out)
    return grad_qkv


def _run_attention(
    function: Callable[[ctypes.Array[ctypes.c_int64], float], int],
    qkv: Tensor,
    num_heads: int,
    result: Tensor,
    grad_out: Tensor | None = None,
) -> None:
    B, N, width = qkv.shape
    head_dim = width // (3 * num_heads)
    gradient = (0, 0, 0) if grad_out is None else (grad_out.data_ptr(), *grad_out.stride()[:2])
    call = _AttentionCall(
        _DTYPES[qkv.dtype], _isa, torch.get_num_threads(), B, N, num_heads, head_dim,
        qkv.data_ptr(), *qkv.stride()[:2], result.data_ptr(), *gradient, 0,
    )  # fmt: skip
    if function(call, head_dim**-0.5):
        raise MemoryError("self-attention: no memory for the scratch of the CPU kernel")


# ---- gradient of GELU ----


def gelu_why_not(x: Tensor) -> str | None:
    """None where the kernel can compute the gradient of GELU at `x`, otherwise the reason."""
    return _single_why_not(x)


def gelu_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """grad_out * d(x Phi(x))/dx in the shape of `x`, contiguous; both tensors have one shape and dtype."""
    x, grad_out = x.contiguous(), grad_out.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    _library.volo_gelu_backward(
        _GeluCall(
            _DTYPES[x.dtype], _isa, torch.get_num_threads(), x.numel(),
            x.data_ptr(), grad_out.data_ptr(), grad_x.data_ptr(),
        )
    )  # fmt: skip
    return grad_x
