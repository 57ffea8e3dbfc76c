"""One optimizer step: the losses, micro-batches, gradients summed over the workers, and optimizers."""
