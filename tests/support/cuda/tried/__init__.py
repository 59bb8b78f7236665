"""The public operations, each in a case of its own, and what is asked of them."""
