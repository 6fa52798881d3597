"""Shows K-FAC in PyTorch Lightning: automatic optimization as it is, and manual optimization for accumulation.

    python -m examples.lightning_module

Automatic optimization passes forward and backward pass to `optimizer.step` as a closure, which KFAC runs inside a
capture: there is nothing to add. With `accumulate_grad_batches` Lightning runs all micro-batches but the last one
outside of `step`, so accumulation takes manual optimization, with a capture for each micro-batch.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from algoperf_kfac.pytorch import KFAC

try:
    import lightning
except ModuleNotFoundError as error:
    raise SystemExit(f"'{error.name}' is not installed. Run: pip install -e '.[torch,examples]'") from None

MICRO_BATCHES = 4


class Automatic(lightning.LightningModule):
    """A classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 3))
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> KFAC:
        # Lightning wraps the model for several processes itself, so K-FAC is told of them here.
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        return KFAC(self, approximation="reduce", learning_rate=1e-2, process_group=group)


class Accumulating(Automatic):
    """The same with micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        optimizer = self.optimizers()
        with optimizer.optimizer.capture(loss_normalizer=len(batch[0]) * MICRO_BATCHES):
            self.manual_backward(self.loss(batch) / MICRO_BATCHES)
        if (number + 1) % MICRO_BATCHES == 0:
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    x = torch.randn(1024, 20)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=16, shuffle=True)
    for module in (Automatic(), Accumulating()):
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        first, last = (sum(part) / len(part) for part in (module.losses[:8], module.losses[-8:]))
        print(f"{type(module).__name__}: loss {first:.3f} -> {last:.3f} in {trainer.global_step} steps")
        assert last < first
    print(module.optimizers().optimizer.coverage())


if __name__ == "__main__":
    main()
