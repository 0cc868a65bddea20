"""Paths in trees of dicts and lists, as in JSON and YAML."""


def walk(tree, path=()):
    """(path, value) of every node of a tree."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from walk(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree
