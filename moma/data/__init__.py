"""Training data: (image, subject mask, label, caption), from folders and tar shards."""
