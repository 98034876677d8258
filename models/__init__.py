"""The public networks, hand-written: parameter names are those of the public files."""
