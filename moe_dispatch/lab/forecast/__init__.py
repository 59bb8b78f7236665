"""Scaling on paper: what a layer sends over which links, for a model and a cluster. Used by ``plan`` alone."""
