"""Bilevel optimization in PyTorch without learning rates."""
