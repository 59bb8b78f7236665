"""``validate``: train a small model under every kind of parallelism and compare it with one process."""
