"""The commands but `serve`: they ask a running server, or look at this host."""
