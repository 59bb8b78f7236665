"""What we use of Transformers for attention, or an ImportError that names the versions that have it."""

import transformers

WORKS = "5.23 up to, but not including, 6"

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        f"transformers {transformers.__version__} has no interface for attention and masks that sp_attention knows; "
        f'versions {WORKS}, work: pip install "transformers>=5.23,<6"'
    ) from error

__all__ = ["AttentionInterface", "AttentionMaskInterface"]
