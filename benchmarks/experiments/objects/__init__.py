"""Submissions for experiments on what no hyperparameter says; each file one."""
