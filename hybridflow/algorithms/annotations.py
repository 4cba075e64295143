"""Which attributes of an algorithm are roles."""

from __future__ import annotations

import sys

from hybridflow import registry


def is_worker(annotation: object, owner: type) -> bool:
    """Whether an annotation of an algorithm, as written or as a class, names a class of worker.

    Names that are imported for type checkers only do not resolve: what is written is looked up among the built-in roles, and
    else in the module of the algorithm.
    """
    if isinstance(annotation, str):
        if annotation in {name.partition(":")[2] for name in registry.ROLES.values()}:
            return True
        annotation = vars(sys.modules[owner.__module__]).get(annotation)
    return isinstance(annotation, type) and "layout_of" in {name for base in annotation.__mro__ for name in vars(base)}
