"""What a user sees of a run: tables, JSON, a picture."""
