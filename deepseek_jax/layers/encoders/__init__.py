"""What makes tokens of pictures, and what brings them to a decoder."""
