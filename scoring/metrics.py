"""What is known of metrics by their names: in which direction they improve, and which values they can have."""

from __future__ import annotations

import re

import numpy as np

# Columns of an evaluation that are metrics of a split of the data.
METRIC = re.compile(r"(train|validation|test)/(?!num_examples$).+")
HIGHER_IS_BETTER = ("accuracy", "ssim", "bleu", "mean_average_precision")
RANGES: dict[str, tuple[float, float]] = {
    "accuracy": (0.0, 1.0),
    "error_rate": (0.0, 1.0),
    "mean_average_precision": (0.0, 1.0),
    "ssim": (-1.0, 1.0),
    "bleu": (0.0, 100.0),
    "wer": (0.0, np.inf),
    "ctc_loss": (0.0, np.inf),
    "ppl": (1.0, np.inf),
    "perplexity": (1.0, np.inf),
}


def higher_is_better(metric: str) -> bool:
    """Whether a metric is to be reached from below; everything but the known few is a loss or an error."""
    return metric in HIGHER_IS_BETTER or metric.startswith(("accuracy", "top"))
