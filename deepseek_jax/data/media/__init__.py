"""Pictures, clips, sounds and points with words: made on the spot, or read from files."""
