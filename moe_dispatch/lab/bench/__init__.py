"""The benchmark: ours, the usual implementation and the floors, timed in one run on this machine."""
