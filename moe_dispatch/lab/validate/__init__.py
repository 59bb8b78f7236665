"""``validate``: train a small model under every kind of parallelism and compare it with one process."""

EVERY_TYPE = "every-type"  # of --hf: all that there are
