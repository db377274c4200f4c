"""Tensor augmentations: stored crop-and-flip views (views.py), the pair of views of self-supervised training (ssl_pair.py)."""
