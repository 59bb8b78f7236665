"""A model on a mesh against the same model in one process: logits, loss, gradients and the loss curve."""
