"""The TOML file of a validate run: its tables, the rules between their keys, and how it is read."""
