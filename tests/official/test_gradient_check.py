"""G^T A = dL/dW is seen of layers whose sums are formed within compiled graphs, too."""

from __future__ import annotations

import pytest
import torch

from algoperf_kfac.pytorch import KFAC
from benchmarks.official.gradient_check import CapturedGradients
from tests.pytorch.toys import convnet, images, train


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_captured_gradients_are_those_of_the_weights(approximation: str, backend: str | None) -> None:
    torch._dynamo.reset()
    model = convnet()
    trained = model if backend is None else torch.compile(model, backend=backend)
    optimizer = KFAC(trained, factor_interval=1, refresh_interval=4, approximation=approximation)
    train(trained, optimizer, [images()])
    captured = CapturedGradients()
    with captured.listening():
        train(trained, optimizer, [images()])
    errors, bounds = captured.errors(model)
    layers = [layer.name for layer in optimizer.coverage().layers]
    assert bool(optimizer.coverage().note) == (backend is not None)
    assert sorted(errors) == sorted(layers)
    assert all(error < 1e-4 + bounds[name] for name, error in errors.items())
    assert all(bound > 0 for bound in bounds.values())
    # Of another gradient they are not.
    for p in model.parameters():
        p.grad = 1.01 * p.grad
    assert min(captured.errors(model)[0].values()) > 5e-3
