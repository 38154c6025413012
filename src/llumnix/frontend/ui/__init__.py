"""The page that shows a deployment while it serves, and the feed that tells it what happens."""
