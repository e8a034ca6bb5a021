"""Number formats: pure functions that encode arrays in few bits and decode them."""
