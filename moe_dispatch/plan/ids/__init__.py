"""The expert ids of a group: what can be wrong with them, how wide they are, how they come to every rank."""
