"""Ranks that are processes: their life, their parent's view of them, and who ends them if it dies."""
