"""Generation: prefill, decode, sampling."""
