"""The management API and its page."""
