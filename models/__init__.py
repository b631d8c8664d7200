"""Checkpoints: configuration, dense half, expert weights by (layer, expert), tokenizer."""
