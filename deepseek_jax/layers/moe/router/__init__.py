"""Routers: one file a kind."""
