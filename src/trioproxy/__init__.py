"""trioproxy: an OpenAI-API proxy for people who share scarce model capacity."""

__version__ = "0.1.0"
