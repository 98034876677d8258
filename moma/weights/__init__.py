"""The bundle, and public checkpoints on their way into it."""
