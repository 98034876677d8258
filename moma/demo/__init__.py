"""A page to draw with, in the browser: `python -m moma.demo`."""
