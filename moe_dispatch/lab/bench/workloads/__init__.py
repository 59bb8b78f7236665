"""What every contender is given: the facts of a workload, and each rank's tensors, the same in every run."""
