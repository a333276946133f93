"""A self-healing supervisor for vLLM servers."""

__version__ = "0.1.0"
