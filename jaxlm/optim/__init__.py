"""Optimizers: optax's where optax has them, and what the field lacks."""
