"""Mixture of experts: routers, dispatch, experts, and the layer that joins them."""
