"""The building blocks of VOLO on token grids [B, H, W, C]; they know nothing of stages.

Parameter names are the original's, so that its weights and timm's load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from volo.ops import portable
from volo.ops.dispatch import is_exporting
from volo.ops.library import outlook_attention_packed, packed_why_not
from volo.ops.outlook_attention import outlook_attention, window_grid
from volo.ops.packed import pack
from volo.ops.reference import outlook_attention_reference
from volo.ops.self_attention import self_attention


class DropPath(nn.Module):
    """Stochastic depth per image: in training, zero the residual branch with probability `drop_prob` and rescale."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.4g}"


class Mlp(nn.Module):
    """Linear, GELU, Linear; shapes [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class OutlookAttention(nn.Module):
    """Outlook attention with its projections (paper, section 3.1): [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: heads N; head_dim = dim / N.
        kernel_size: side K of a window in tokens.
        stride: tokens between windows; the logits come from the input averaged over stride x stride tokens.
        padding: reach of the first window over the edge.
        qkv_bias: bias of the value projection (False in D1-D5).
        attn_drop: dropout on the softmax. Above 0 training runs on the reference backend.
        proj_drop: dropout after the output projection.

    Attributes:
        portable: whether to compute by `volo.ops.portable`, in operations that every runtime has. None: in graphs that are
            being exported, and nowhere else.
        packs: whether GPU kernels get packed logits (`volo.ops.packed`) where that pays; if not, rows as they are. Off
            for all layers until those kernels have run on a GPU; `layer.packs = True` turns it on.
        keeps_packed: whether to keep the copy of `attn`'s parameters that packing takes, rather than to make it at each
            call, while no gradients are wanted. It is made anew when these change, except through `.data`.

    Raises ValueError when `dim` is no multiple of `num_heads`, or when kernel, stride and padding give another number
    of windows than the pooled input has positions (ceil(H / stride) by ceil(W / stride)).
    """

    packs = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; given: dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.scale = (dim // num_heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.attn_drop = attn_drop
        self.portable: bool | None = None
        self.keeps_packed = False
        self._kept: tuple[list[Any], tuple[Tensor, Tensor | None]] | None = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript knows neither the checks nor the kernels
            value, logits = self._project(x)
            dropout = self.attn_drop if self.training else 0.0
            out = outlook_attention_reference(
                value, logits, self.kernel_size, self.stride, self.padding, self.scale, dropout
            )
        else:
            out = self._attend(x)
        return self.proj_drop(self.proj(out.flatten(3)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H, W, C] -> value [B, H, W, heads, head_dim] and logits [B, h, w, heads, K*K, K*K]."""
        value = self.v(x).unflatten(-1, (self.num_heads, -1))
        return value, self._logits(self._pool(x))

    def _pool(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> what the logits come from, [B, h, w, C]."""
        s = self.stride
        if s == 1:
            return x
        # A permuted view of contiguous tokens is a channels-last image: pooling it copies nothing.
        return F.avg_pool2d(x.permute(0, 3, 1, 2), s, s, ceil_mode=True).permute(0, 2, 3, 1)

    def _logits(self, pooled: Tensor) -> Tensor:
        K2 = self.kernel_size * self.kernel_size
        return self.attn(pooled).unflatten(-1, (self.num_heads, K2, K2))

    @torch.jit.unused
    def _attend(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> what the output projection takes, its channels in one dimension or in two."""
        K, s, p = self.kernel_size, self.stride, self.padding
        drops = self.training and self.attn_drop > 0.0
        if not drops and (is_exporting() if self.portable is None else self.portable):
            logits = self.attn(portable.average_pool(x, s))
            return portable.outlook_attention(self.v(x), logits, self.num_heads, K, s, p, self.scale)
        H, W = x.shape[1:3]
        value, pooled = self.v(x).unflatten(-1, (self.num_heads, -1)), self._pool(x)
        grid = window_grid(H, W, K, s, p)
        if pooled.shape[1:3] != grid:
            raise ValueError(
                f"kernel_size={K}, stride={s}, padding={p} give {grid} windows on a {H} x {W} grid, but outlook attention "
                f"needs {tuple(pooled.shape[1:3])} = ceil(size / stride); padding = (kernel_size - 1) // 2 with an odd kernel always fits"
            )
        if not drops and self._packs(value) and packed_why_not(value, grid, K, s, p) is None:
            packed = F.linear(pooled, *self._packed_parameters())  # type: ignore[arg-type]
            return outlook_attention_packed(value, packed, K, s, p, self.scale)
        logits = self._logits(pooled)
        if drops:
            if torch.is_autocast_enabled(value.device.type):
                value, logits = (t.to(torch.get_autocast_dtype(value.device.type)) for t in (value, logits))
            return outlook_attention_reference(value, logits, K, s, p, self.scale, self.attn_drop)
        return outlook_attention(value, logits, kernel_size=K, stride=s, padding=p, scale=self.scale)

    def _packs(self, value: Tensor) -> bool:
        """Whether packed logits pay, and come from the parameters of `attn`: a plain Linear that nobody watches."""
        attn = self.attn
        is_plain = type(attn) is nn.Linear or getattr(attn, "is_plain_linear", False)
        is_watched = attn._forward_hooks or attn._forward_pre_hooks or attn._backward_hooks
        # In float32 the one kernel for both gradients takes longer than the two on rows.
        pays = value.dtype != torch.float32 or not torch.is_grad_enabled()
        return self.packs and pays and is_plain and not is_watched

    def _packed_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the Linear that gives packed logits, made of those of `attn`."""
        weight, bias = self.attn.weight, self.attn.bias
        if not self.keeps_packed or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._pack(weight, bias)
        # A tensor's version rises when it changes in place, but not when that is done through `.data`.
        present = [p for p in (weight, bias) if p is not None]
        identity = [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in present]
        if self._kept is None or self._kept[0] != identity:
            self._kept = identity, self._pack(weight, bias)
        return self._kept[1]

    def _pack(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        n, K = self.num_heads, self.kernel_size
        return pack(weight, n, K), None if bias is None else pack(bias, n, K)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens of the grid: [B, H, W, dim] -> [B, H, W, dim]."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; given: dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H * W, 3 * C)
        out = self_attention(qkv, self.num_heads, self.attn_drop if self.training else 0.0)  # [B, H * W, C]
        return self.proj_drop(self.proj(out.view(B, H, W, C)))


class ClassAttention(nn.Module):
    """The class token looks at itself and all tokens: [B, 1 + N, dim] -> [B, 1, dim] (CaiT, arXiv 2103.17239)."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; given: dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        # Views of rank 4 at most, for the runtimes that know no more.
        k, v = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, dim=-1)]
        q = self.q(x[:, :1]).view(B, self.num_heads, 1, C // self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, 1, C)))


class Outlooker(nn.Module):
    """Outlook attention and an MLP, each on a normalised residual branch (eq. 1 and 2): [B, H, W, dim] -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = OutlookAttention(dim, num_heads, kernel_size, stride, padding, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Pre-norm transformer block on the token grid: [B, H, W, dim] -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """Class attention and an MLP that change the class token only: [B, 1 + N, dim] -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        class_token = x[:, :1]
        class_token = class_token + self.attn(self.norm1(x))
        class_token = class_token + self.mlp(self.norm2(class_token))
        return torch.cat([class_token, x[:, 1:]], dim=1)


class PatchEmbed(nn.Module):
    """Convolutional stem and patch projection: [B, in_chans, H, W] -> tokens [B, H / patch_size, W / patch_size, dim].

    Conv 7x7 with `stem_stride`, two 3x3 (each with BatchNorm and ReLU), then a projection whose kernel and stride are
    what is left of `patch_size`.
    """

    def __init__(
        self, in_chans: int = 3, stem_dim: int = 64, patch_size: int = 8, dim: int = 192, stem_stride: int = 2
    ) -> None:
        super().__init__()
        if patch_size % stem_stride:
            raise ValueError(f"patch_size must be a multiple of stem_stride; given: {patch_size} and {stem_stride}")
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 7, stride=stem_stride, padding=3, bias=False),
            nn.BatchNorm2d(stem_dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem_dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem_dim),
            nn.ReLU(inplace=True),
        )
        rest = patch_size // stem_stride
        self.proj = nn.Conv2d(stem_dim, dim, rest, stride=rest)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.conv(images)).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]

    def fold_batch_norm(self) -> None:
        """Multiply each BatchNorm's running statistics into the convolution before it; for inference only."""
        for i in range(0, len(self.conv), 3):
            conv, norm = self.conv[i], self.conv[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                self.conv[i] = fuse_conv_bn_eval(conv, norm)
                self.conv[i + 1] = nn.Identity()


class Downsample(nn.Module):
    """Strided convolution between the stages: [B, H, W, dim] -> [B, H / 2, W / 2, out_dim]."""

    def __init__(self, dim: int, out_dim: int, patch_size: int = 2) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
