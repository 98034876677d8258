"""Training (Sec. 3.4): the loop, checkpoints, ranks, and the two kinds of training that methods have."""
