"""The tools around the library: ``validate``, ``bench`` and ``plan``, and the command line that starts them.

Each tool has a room of its own and imports no other tool; what they share is in ``desk``. The library imports nothing
from here.
"""
