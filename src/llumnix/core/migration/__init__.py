"""How a request moves: two tables of transitions, and what walks them."""
