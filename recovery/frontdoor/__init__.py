"""The OpenAI-compatible proxy that loses no request."""
