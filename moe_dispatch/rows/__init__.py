"""Rows of floats, moved by a plan: gathered, exchanged, summed. No arithmetic on indices."""
