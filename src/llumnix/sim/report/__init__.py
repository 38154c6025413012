"""The page with plots."""
