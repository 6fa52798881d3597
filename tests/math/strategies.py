"""Random convolutions with inputs that fit them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool) -> tuple[nn.Module, Tensor]:
    """A (transposed) convolution of 1 to 3 dimensions, and a batch of inputs.

    Strides, dilations and paddings differ between dimensions; groups include depthwise layers (one channel each).
    """
    dims = draw(st.sampled_from([1, 1, 2, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel = sizes(1, 2 if dims == 3 else 3)
    dilation, padding = sizes(1, 2), sizes(0, 2)
    groups = draw(st.integers(1, 3))
    c_in, c_out = (groups * draw(st.integers(1, 2)) for _ in range(2))
    options: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        stride = options["stride"] = sizes(1, 3)
        extra = options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        options["padding"] = padding
        size = sizes(1, 3)
        geometry = zip(size, stride, padding, dilation, kernel, extra, strict=True)
        assume(all((n - 1) * s - 2 * p + d * (k - 1) + o >= 0 for n, s, p, d, k, o in geometry))
    else:
        options["padding_mode"] = draw(st.sampled_from(MODES))
        options["padding"] = draw(st.sampled_from(["same", "valid", padding, padding, padding]))
        options["stride"] = 1 if options["padding"] == "same" else sizes(1, 3)
        if options["padding"] == "same":
            padding = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        # Reflection needs more entries than it pads, a valid convolution as many as its kernel spans.
        least = [max(d * (k - 1) + 1, p + 1) for d, k, p in zip(dilation, kernel, padding, strict=True)]
        size = tuple(n + draw(st.integers(0, 2)) for n in least)
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = (TRANSPOSED if transposed else CONVOLUTIONS)[dims](c_in, c_out, kernel, **options)
    return layer, torch.randn(draw(st.integers(1, 3)), c_in, *size)
