"""``plan``: what a layer sends over which links of a cluster, and what that costs. Nothing is run."""
