"""A training run: state, length, checkpoints, EMA, optimizers, learning rate, metrics, stopping, planning."""
