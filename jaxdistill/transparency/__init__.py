"""The technical transparency index of arXiv 2411.16489: what a work discloses, as points. Never imports jax."""
