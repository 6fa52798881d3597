"""Training a submission for a few steps, as the runner would."""

from __future__ import annotations

from workloads import seeds


def start(submission, workload, point=None):
    """A fresh model and the submission's state for it."""
    model, state = workload.init_model_fn(seeds.root(1))
    return model, submission.init_optimizer_state(workload, model, state, point, seeds.root(2))


def train(submission, workload, model, state, steps, first=0, point=None):
    """Steps `first` to `first + steps` on batches of 16; returns the model."""
    queue = workload._build_input_queue(seeds.root(3), "train", "", 16)
    queue.position = first
    for step in range(first, first + steps):
        batch = submission.data_selection(workload, queue, state, model, None, point, step, None)
        state, model, _ = submission.update_params(
            workload=workload,
            current_param_container=model,
            current_params_types=workload.model_params_types,
            model_state=None,
            hyperparameters=point,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=state,
            eval_results=[],
            global_step=step,
            rng=seeds.root(step),
            train_state={},
        )
    return model
