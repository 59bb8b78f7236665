"""Which row goes where: integers only, no gradient, and the only copy to the host. Three kinds of plan, one way to
use them (``planner.py``)."""
