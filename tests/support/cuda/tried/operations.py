"""All operations that are tried on a device."""

from .of_attention import OF_ATTENTION
from .of_experts import OF_EXPERTS
from .of_groups import OF_GROUPS

OPERATIONS = (*OF_EXPERTS, *OF_GROUPS, *OF_ATTENTION)
RANKS = 4
