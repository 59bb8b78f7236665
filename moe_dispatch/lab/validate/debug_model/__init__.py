"""The model that ``validate`` trains, in one process and on a mesh."""
