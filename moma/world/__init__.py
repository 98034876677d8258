"""A drawn world of subjects in scenes, and classifiers that look at images of it."""
