"""Kernels in Triton, for CUDA: what plans and rows do in several launches, in one."""
