"""Places in a tree of dicts and lists, as JSON and YAML have them."""


def walk(tree, path=()):
    """(path, value) of every place in a tree."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from walk(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree
