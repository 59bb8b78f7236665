"""What a training step needs beside the MoE layer: sums of gradients, their norm, equal replicas, state dicts."""
