"""What ``expand`` gives, and whether it says all that it uses, before a rank promises its peers anything."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from moe_dispatch.internals import unseen_by_policies

from ...attend.parts import versions
from ...spread.expansion import Expansion, expanded, unseen_by_hooks

ROWS = 2  # one would pass what squeezes it, none what infers a size


@unseen_by_policies
def trial(expansion: Expansion, latent_BlC: Tensor, weights: tuple[Tensor, ...]) -> tuple[int, str]:
    """The width of values that ``expand`` gives for rows of zeros, and what is wrong with it; empty where nothing is.

    A gradient that ``expand`` would lose is wrong: each block of rows is expanded by itself, and what it depends on
    besides its arguments is not known there.

    Args:
        expansion: of this rank; the width of its values is not known yet.
        latent_BlC: for the dtype, the device and the sizes.
    """
    batch, _, width = latent_BlC.shape
    zeros_BLC = latent_BlC.new_zeros(max(batch, 1), ROWS, width).requires_grad_(torch.is_grad_enabled())
    copies = [x.detach().requires_grad_(x.requires_grad) for x in weights]
    before = versions(zeros_BLC, *copies)
    with unseen_by_hooks():
        given, problem = expanded(expansion, zeros_BLC, copies)
    if problem:
        return 0, problem
    if versions(zeros_BLC, *copies) != before:
        return 0, "expand writes to its arguments, which are the caller's, and expanded again; write to copies"
    for strange in leaves_of(given):
        if all(strange is not known for known in (zeros_BLC, *copies)):
            return 0, (
                f"expand uses a tensor {tuple(strange.shape)} that wants a gradient and is none of its arguments, so "
                "that its gradient would be lost; pass it in weights, and use it from there"
            )
    return given[1].shape[3], ""


def leaves_of(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors whose gradients are accumulated in a backward of these."""
    leaves: list[Tensor] = [x for x in tensors if x.is_leaf and x.requires_grad]
    found: set[Node] = set()
    left = [x.grad_fn for x in tensors]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        found.add(node)
        variable: Any = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        left += [following for following, _ in node.next_functions]
    return leaves
