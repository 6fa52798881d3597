"""Shows K-FAC in a loop of Hugging Face accelerate, with gradient accumulation.

    python -m examples.accelerate_loop

The model is prepared first and the optimizer made of the result, so that K-FAC sees which processes share a batch.
`accelerator.backward` divides each loss by the number of micro-batches of a step; the mean over a micro-batch of n
examples is divided by n times that number in all, which is the `loss_normalizer`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from algoperf_kfac.pytorch import KFAC

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise SystemExit(f"'{error.name}' is not installed. Run: pip install -e '.[torch,examples]'") from None

MICRO_BATCHES = 4


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES, cpu=True)
    model = accelerator.prepare(nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 3)))
    x = torch.randn(1024, 20)
    data = TensorDataset(x, x[:, :3].argmax(dim=1))
    loader = DataLoader(data, batch_size=16, shuffle=True, drop_last=True)
    kfac = KFAC(model, approximation="reduce", learning_rate=1e-2)
    optimizer, loader = accelerator.prepare(kfac, loader)
    losses = []
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                with kfac.capture(loss_normalizer=len(x) * MICRO_BATCHES):
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                optimizer.step()  # does nothing but at the last micro-batch of a step
                optimizer.zero_grad()
            losses.append(loss.item())
    print(kfac.coverage())
    first, last = (sum(part) / len(part) for part in (losses[:8], losses[-8:]))
    print(f"loss {first:.3f} -> {last:.3f} in {kfac.metrics()['steps']:.0f} steps of {MICRO_BATCHES} micro-batches")
    assert last < first


if __name__ == "__main__":
    main()
