"""How good a model is: methods drawn side by side, the paper's protocol, scores, figures."""
