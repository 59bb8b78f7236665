"""Where the ranks of a tool come from, and what joined ones tell each other."""
