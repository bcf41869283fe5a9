"""What strangers send: for each door of the toolkit hostile inputs of every kind, and how each of them ends."""
