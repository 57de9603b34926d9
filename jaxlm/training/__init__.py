"""Runs: the training step and loop, checkpoints, metrics, and opening what a run left."""
