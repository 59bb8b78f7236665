"""Plans by counts: numbers of rows and choices come first, ids with the rows, so that no rank gets ids that it has no
use for."""
