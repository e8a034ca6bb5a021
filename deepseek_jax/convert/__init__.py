"""Weights from other layouts and to them, tensor by tensor."""
