"""One migration a file; each names the one before it."""

__all__: list[str] = []
