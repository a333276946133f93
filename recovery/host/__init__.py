"""The use cases of one GPU host; the only code that touches processes."""
