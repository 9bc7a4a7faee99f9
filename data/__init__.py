"""How photos are found, read, cut around a face and cached. The photos are in the folders beside this file."""
