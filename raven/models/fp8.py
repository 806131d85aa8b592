"""Linear layers in float8 for inference: weights with a scale for each output, inputs with one for each token.

The product is ``torch._scaled_mm`` with row-wise scales, which needs compute capability 8.9, widths that are multiples
of 16, and gives bfloat16. Everywhere else (a CPU, or with the reference backend asked for) the same float8 numbers are
scaled back and multiplied as they are: the same result but for the sums' rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.nn.modules.module as _everywhere
from torch import nn

from raven import backends
from raven.errors import BackendUnavailableError
from raven.ops import quantize_rows

# Linear layers of a block that are worth it; the text's keys and values are computed once a prompt.
PARTS = {"self_attn": ("qkv", "q", "k", "v", "o"), "cross_attn": ("q", "o"), "ffn": ("0", "2")}
MULTIPLE = 16


class Float8Rows(NamedTuple):
    """A tensor ``[..., C]`` that was quantised where it was made: a ``Float8Linear`` takes it in the tensor's place."""

    values: torch.Tensor  # [..., C] float8_e4m3fn
    scale: torch.Tensor  # [...] float32
    dtype: torch.dtype  # of what was quantised, and of the layer's result


class Float8Linear(nn.Module):
    """``nn.Linear`` for inference, made from one: ``[..., in]`` of any floating dtype to ``[..., out]`` of the same.

    ``weight`` ``[out, in]`` float8_e4m3fn, ``scale`` ``[out]`` float32: a weight is their product. ``bias`` ``[out]``
    or ``None``, as it was. An input is quantised by ``raven.ops.quantize_rows``, if it does not come as ``Float8Rows``;
    on a GPU the product is rounded to bfloat16. Moving to another dtype leaves weight and scale as they are.

    Raises ``ValueError`` for widths that are not multiples of 16, and for inputs that require a gradient;
    ``BackendUnavailableError`` on a GPU below compute capability 8.9.
    """

    def __init__(self, linear: nn.Linear, name: str = "linear") -> None:
        super().__init__()
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ValueError(
                f"{name}: got a layer from {linear.in_features} to {linear.out_features} channels, expected multiples "
                f"of {MULTIPLE}, as float8 products need them"
            )
        _check_device(linear.weight.device)
        with torch.no_grad():
            weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.train(False)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scale and bias."""
        return sum(x.nbytes for x in (self.weight, self.scale, self.bias) if x is not None)

    def forward(self, x: torch.Tensor | Float8Rows) -> torch.Tensor:
        if isinstance(x, Float8Rows):
            _check_width(x.values, self.in_features)
            return self.product(*x)
        _check_width(x, self.in_features)
        return self.product(*quantize_rows(x), _result_dtype(x))

    def product(self, x: torch.Tensor, x_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The result ``[..., out]`` in ``dtype`` for a quantised input ``[..., in]`` with scales ``[...]``."""
        if not x.is_cuda or backends.get_backend() == "reference":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            values, weight = (
                (t.to(wide) * s.to(wide).unsqueeze(-1)) for t, s in ((x, x_scale), (self.weight, self.scale))
            )
            return F.linear(values, weight, None if self.bias is None else self.bias.to(wide)).to(dtype)
        _check_device(x.device)
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return torch.empty((*x.shape[:-1], self.out_features), dtype=dtype, device=x.device)
        # cuBLAS has no kernel with a bias for some products of a few rows.
        inside = self.bias is not None and self.bias.dtype == torch.bfloat16 and rows.shape[0] >= 128
        out = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=x_scale.reshape(-1, 1),
            scale_b=self.scale.unsqueeze(0),
            bias=self.bias if inside else None,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        if self.bias is not None and not inside:
            out = out.to(self.bias.dtype) + self.bias
        return out.to(dtype).view(*x.shape[:-1], -1)

    def train(self, mode: bool = True) -> Float8Linear:
        if mode:
            raise ValueError("mode: got True, expected False: float8 layers have no gradient and cannot be trained")
        return super().train(False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise RuntimeError(
            f"{prefix.removesuffix('.') or 'state_dict'}: float8 layers are made in memory and not saved; "
            "save the model before quantize_linears, and call that again after loading"
        )

    def _load_from_state_dict(self, state_dict, prefix, *unused):
        _refuse_to_load(self, state_dict, prefix)

    def _apply(self, fn, recurse=True):
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        # ``model.to(dtype)`` means the other layers: float8 counts as floating point and would be cast.
        if self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Float8MLP(nn.Module):
    """Linear, GELU (tanh), linear, both layers in float8: GELU and the rounding of its result are one pass."""

    def __init__(self, up: nn.Linear, down: nn.Linear, name: str = "ffn") -> None:
        super().__init__()
        self.add_module("0", Float8Linear(up, f"{name}.0"))
        self.add_module("2", Float8Linear(down, f"{name}.2"))

    def forward(self, x: torch.Tensor | Float8Rows) -> torch.Tensor:
        up, down = self._modules.values()
        hidden = up(x)
        return down.product(*quantize_rows(hidden, gelu=True), hidden.dtype)


def takes_rows(module: nn.Module, name: str) -> bool:
    """Whether the input of ``module``, which only its linear layer ``name`` reads, may be ``Float8Rows``.

    Not where a hook or another ``forward`` would see it, or where the layer is another one (as by an adapter).
    """
    layer = module._modules.get(name)
    if type(layer) is not Float8Linear or _everywhere._global_forward_hooks or _everywhere._global_forward_pre_hooks:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in (module, layer))


@torch.no_grad()
def quantize_linears(
    model: nn.Module, parts: Collection[str] = tuple(PARTS), skip_blocks: Collection[int] = ()
) -> nn.Module:
    """Replace the large linear layers of a ``CausalWan``'s blocks by float8 ones, in place; returns the model.

    Queries, keys, values and output of the self-attention, query and output of the cross-attention, and the MLP; not
    the embeddings, the time's layers, the head, and the text's keys and values. Halves the memory of those weights.
    The model is for inference from then on: in evaluation mode, without gradients; ``load_state_dict`` is refused.

    parts: which of "self_attn", "cross_attn", "ffn". skip_blocks: indices of blocks that stay as they are.
    Raises ``ValueError`` for an unknown part or block, widths that are not multiples of 16 or a model that was
    quantised before, and ``BackendUnavailableError`` on a GPU below compute capability 8.9, with the model unchanged.
    """
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise TypeError(f"model: got {type(model).__name__}, expected a CausalWan")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts: got {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    blocks = list(model.blocks)
    if wrong := sorted(i for i in skip_blocks if not 0 <= i < len(blocks)):
        raise ValueError(f"skip_blocks: got {wrong[0]}, expected 0 to {len(blocks) - 1}")
    if any(isinstance(module, Float8Linear) for module in model.modules()):
        raise ValueError("model: got one with float8 layers already, expected one that was not quantised")
    made: list[tuple[nn.Module, str, nn.Module]] = []
    for i, block in enumerate(blocks):
        if i in skip_blocks:
            continue
        for part in parts:
            name, module = f"blocks.{i}.{part}", getattr(block, part)
            linears = {k: m for k in PARTS[part] if isinstance(m := module._modules.get(k), nn.Linear)}
            if part == "ffn":
                made.append((block, part, Float8MLP(linears["0"], linears["2"], name)))
            else:
                made += [(module, k, Float8Linear(m, f"{name}.{k}")) for k, m in linears.items()]
    for parent, name, module in made:
        setattr(parent, name, module)
    model.register_load_state_dict_pre_hook(_refuse_to_load)  # before any of its weights is replaced
    return model.requires_grad_(False).eval()


def _refuse_to_load(module: nn.Module, state: object, prefix: str, *unused: object) -> None:
    name = prefix.removesuffix(".") or "state_dict"
    raise ValueError(
        f"{name}: got weights for a {type(module).__name__} in float8, expected none: float8 layers are made from "
        "loaded weights, so load a model before quantize_linears"
    )


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    """That of x, or of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _check_width(x: torch.Tensor, width: int) -> None:
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {width}]")


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and backends.capability(device.index or 0) < (8, 9):
        raise BackendUnavailableError(
            f"float8 linear layers: got a GPU of compute capability {backends.capability(device.index or 0)}, "
            "expected at least (8, 9)"
        )
