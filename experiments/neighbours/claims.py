"""x."""


def table(folder):
    return ""
