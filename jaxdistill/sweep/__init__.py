"""Grids of runs, the table of what came out, and the laws fitted to it."""
