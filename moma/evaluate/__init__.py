"""Evaluation by the DreamBooth protocol (Ruiz et al., arXiv 2208.12242), as the paper's tables."""
