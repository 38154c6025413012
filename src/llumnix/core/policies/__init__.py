"""Policies: each a pure function or a small class over the view; chosen by name."""
