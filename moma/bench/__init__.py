"""How fast and how small this is here: `python -m moma.bench`."""
