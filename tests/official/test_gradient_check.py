"""G^T A = dL/dW is seen of layers whose sums are formed within compiled graphs, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from algoperf_kfac.pytorch import KFAC
from benchmarks.official.gradient_check import CapturedGradients, handing_on
from tests.pytorch.toys import convnet, images, train


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_captured_gradients_are_those_of_the_weights(approximation: str, backend: str | None) -> None:
    torch._dynamo.reset()
    model = convnet()
    trained = model if backend is None else torch.compile(model, backend=backend)
    optimizer = KFAC(trained, factor_interval=1, refresh_interval=4, approximation=approximation)
    captured = CapturedGradients()
    with handing_on():
        train(trained, optimizer, [images()])
        with captured.listening():
            train(trained, optimizer, [images()])
        sums = {name: total.clone() for name, total in captured.sums.items()}
        train(trained, optimizer, [images()])  # nobody listens
    assert all(torch.equal(captured.sums[name], total) for name, total in sums.items())
    with handing_on(), captured.listening():  # the graph is there
        captured.sums.clear()
        captured.magnitudes.clear()
        captured.again.clear()
        train(trained, optimizer, [images()])
    errors, bounds = captured.errors(model)
    layers = [layer.name for layer in optimizer.coverage().layers]
    assert bool(optimizer.coverage().note) == (backend is not None)
    assert sorted(errors) == sorted(layers)
    assert all(error < 1e-4 + bounds[name] for name, error in errors.items())
    assert all(bound > 0 for bound in bounds.values())
    again = captured.convolution_errors(model)
    assert {layer.name for layer in optimizer.coverage().layers if layer.kind.startswith("conv")} == set(again)
    assert all(single < 1e-6 and double < 1e-9 for single, double in again.values())
    # Of another gradient they are not.
    for p in model.parameters():
        p.grad = 1.01 * p.grad
    assert min(captured.errors(model)[0].values()) > 5e-3
    assert min(single for single, _ in captured.convolution_errors(model).values()) > 5e-3


CONVOLUTIONS = {
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped, dilated": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=(1, 2), bias=False),
    "same, one zero more behind": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 5, stride=3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_gradient_is_formed_again_of_what_was_captured(kind: str) -> None:
    torch.manual_seed(0)
    model = CONVOLUTIONS[kind]()
    optimizer = KFAC(model, factor_interval=1)
    captured = CapturedGradients()
    with captured.listening(), optimizer.capture():
        model(torch.randn(8, 4, 16, 16)).square().mean().backward()
    ((name, (single, double)),) = captured.convolution_errors(model).items()
    assert single < 1e-6
    assert double < 1e-9
    captured.sums[name] *= 1 + 1e-6  # as if of other tensors
    assert captured.convolution_errors(model)[name][1] > 5e-7
