"""The calls of a training step over a whole mesh, in one object."""
