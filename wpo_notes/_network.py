"""The perceptron that the kernel model and the denoiser share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["perceptron"]


def perceptron(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Sequential:
    """Feedforward network with GELU (Section 5.1), initialised from `generator` alone.

    The last layer starts at zero, so that what the network parametrises starts at its prior value.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((inputs, *hidden, outputs)):
        # The constructor of nn.Linear would draw from the global generator.
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=dtype, device=device)
        with torch.no_grad():
            bound = fan_in**-0.5  # PyTorch's own default for both
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        layers += [layer, nn.GELU()]
    for parameter in layers[-2].parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(*layers[:-1])
