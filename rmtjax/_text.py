"""Makes names safe to print."""


def printable(name: str) -> str:
    """Returns a name in which control characters, which could steer a terminal, are escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()
