"""A drawn world of subjects in scenes, and classifiers for images of it."""
