"""Known bugs, put in on purpose to show that the comparison finds them."""
