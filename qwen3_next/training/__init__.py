"""Training a model: losses, the train step, optimizers, data."""
