"""MM-Diff (arXiv 2403.15059): several subjects in one image, without tuning and without a layout."""
