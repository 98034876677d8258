"""MoMA (arXiv 2404.05674)."""
