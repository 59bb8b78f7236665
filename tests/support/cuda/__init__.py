"""A CUDA device that is not there: tensors that say ``cuda:0`` and compute on the CPU, ranks that keep NCCL's rules.

Shown by it: no operands on two devices, no wait of the host but those promised, no copy from the host in a layer, no
byte of memory that nobody wrote, no dependence on when an exchange happens, no rank that leaves its peers waiting.
Not shown: streams, kernels of CUDA, speed.
"""
