"""Classes and functions that no other process could import, by the file they are pickled in.

`hybridflow.pickled:/path/to/file.pkl` is a name like `my_package.module:Class`: where the module is asked for an attribute it
reads the file of that name. What was defined in a notebook or a script reaches the processes of a run by it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_objects: dict[str, object] = {}
"""What this process has pickled or read, by path: one class stays one class."""


def name_of(value: object, path: Path) -> str:
    """A name by which every process finds a class or function; it is pickled to `path` where its own does not do."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(qualname, str) and module != "__main__" and "." not in qualname:
        home = sys.modules.get(module)
        if home is not None and vars(home).get(qualname) is value:
            return f"{module}:{qualname}"
    import cloudpickle  # type: ignore[import-untyped]

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cloudpickle.dumps(value))
    _objects[str(path)] = value
    return f"{__name__}:{path}"


def __getattr__(name: str) -> object:
    """The object in the file `name`."""
    if name not in _objects:
        if not os.path.isfile(name):
            raise AttributeError(f"there is no file {name!r} with a pickled object")
        import cloudpickle

        _objects[name] = cloudpickle.loads(Path(name).read_bytes())
    return _objects[name]
