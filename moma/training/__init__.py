"""Training of MoMA (Sec. 3.4): the loop, checkpoints, ranks, and the two stages."""
