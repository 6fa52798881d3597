"""Shows K-FAC in the Trainer of Hugging Face transformers, with gradient accumulation and gradient clipping.

    python -m examples.huggingface_trainer

The optimizer is made of the model and passed in. The trainer runs forward and backward pass in `training_step`,
which a subclass puts into a capture; the trainer's own `model.zero_grad()` needs no care. The loss of a language
model is divided by the number of labels of the whole step, its micro-batches together: the trainer counts them and
passes them on as `num_items_in_batch`, and they are the `loss_normalizer`.
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn

from algoperf_kfac.pytorch import KFAC

try:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(f"'{error.name}' is not installed. Run: pip install -e '.[torch,examples]'") from None

LENGTH, VOCABULARY = 16, 32


class KFACTrainer(Trainer):
    """A trainer whose optimizer is a KFAC."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        divisor = num_items_in_batch
        if divisor is None:  # the model takes the mean of a micro-batch, the trainer divides it by their number
            divisor = (inputs["labels"][:, 1:] != -100).sum() * self.current_gradient_accumulation_steps
        # The trainer wraps the optimizer: `.optimizer` is the one that was passed in.
        with self.optimizer.optimizer.capture(loss_normalizer=divisor):
            return super().training_step(model, inputs, num_items_in_batch)


def counting_sequences(number: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up from a random token."""
    starts = torch.randint(VOCABULARY, (number, 1))
    tokens = (starts + torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=20,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            logging_steps=5,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        # The trainer wraps the model for several processes only later, so K-FAC is told of them here.
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        optimizer = KFAC(model, approximation="expand", learning_rate=1e-2, damping=1e-2, process_group=group)
        print(optimizer.coverage())
        trainer = KFACTrainer(model, arguments, train_dataset=counting_sequences(512), optimizers=(optimizer, None))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss:", *losses)
    print(f"refreshes: {optimizer.metrics()['refreshes']:.0f}")
    assert float(losses[-1]) < float(losses[0])


if __name__ == "__main__":
    main()
