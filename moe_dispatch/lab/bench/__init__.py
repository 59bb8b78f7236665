"""``bench``: time this library, the usual implementations and the bare collectives in turns on CPU ranks."""
