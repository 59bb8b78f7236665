"""Which form of a counted plan costs less: bytes that a rank gets for it, per token of a rank.

By ids, it gets the ids of all tokens: ``ranks * ids``. By counts, it gets as many rows as it sends, if ranks are
loaded alike: at most ``min(ranks, K)`` for each of its tokens, and with each row that token's ids and number:
``min(ranks, K) * (ids + number)``. Up to K ranks that is more; above, it crosses.

Both also send something between each two ranks, whatever the tokens: by ids 4 bytes, by counts 32 or some more
(``message.py``). That is left out, since ranks have to choose alike, also where they disagree about tokens: it is
then found out. For the same reason K counts as the next power of two, and as at least 8. Ids get wider only at such
numbers or more often (``ids/format.py``), so a rank with another K, or none, that would send by ids what its peers
expect is in the same form as they.
"""

from ..ids.format import STEP, IdFormat

NUMBER_STEPS = 1  # of 4 bytes: the number of a token
LEAST_CHOICES = 8


def bytes_by_ids(ranks: int, num_choices: int, num_experts: int) -> int:
    """Bytes that a rank gets for a plan by ids, per token of a rank."""
    return ranks * IdFormat.of(num_choices, num_experts).steps * STEP.itemsize


def bytes_by_counts(ranks: int, num_choices: int, num_experts: int) -> int:
    """The same by counts, where every token has its choices on as many ranks as can be."""
    return min(ranks, num_choices) * riding_steps(num_choices, num_experts) * STEP.itemsize


def riding_steps(num_choices: int, num_experts: int) -> int:
    """Steps of 4 bytes that ride with a row: the number of its token, and the token's ids."""
    return NUMBER_STEPS + IdFormat.of(num_choices, num_experts).steps


def counts_cost_less(ranks: int, num_choices: int, num_experts: int) -> bool:
    """Whether a counted plan of so many ranks is one by counts."""
    rounded = max(1 << (num_choices - 1).bit_length(), LEAST_CHOICES)
    return bytes_by_counts(ranks, rounded, num_experts) < bytes_by_ids(ranks, rounded, num_experts)


def first_by_counts(num_choices: int, num_experts: int) -> int:
    """The least number of ranks whose counted plans are by counts."""
    ranks = num_choices
    while not counts_cost_less(ranks, num_choices, num_experts):
        ranks += 1
    return ranks
