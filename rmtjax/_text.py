"""Names as text that steers no terminal."""


def printable(name: str) -> str:
    """A name that steers neither a terminal nor a table."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()
