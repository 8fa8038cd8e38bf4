"""One paper, one file: the file's name is the method's name, and its one frozen dataclass is the selector.

Files whose name begins with an underscore hold what several methods share and are no methods.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from curation.selector import Selector


def selector_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def selector_class(name: str) -> type:
    """The frozen dataclass of the method `name`; its fields are the method's hyper-parameters.

    ValueError that suggests the nearest name if there is no such method; TypeError if its file does not hold exactly
    one such class.
    """
    if name not in selector_names():
        nearest = difflib.get_close_matches(name, selector_names(), n=1, cutoff=0.0)
        raise ValueError(f"no method is named {name!r}, did you mean {nearest[0]!r}? There are {selector_names()}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    selectors = [c for c in classes if _is_frozen_dataclass(c) and callable(getattr(c, "select", None))]
    if len(selectors) != 1:
        found = [c.__name__ for c in selectors]
        raise TypeError(f"methods/{name}.py must hold exactly one frozen dataclass with a `select`, it holds {found}")
    return selectors[0]


def load_selector(name: str, **fields: Any) -> Selector:
    """The selector of the method `name` with the given hyper-parameters, the paper's defaults elsewhere.

    ValueError if there is no such method, or no such field, or a value is of another type, or a field without a default
    is missing.
    """
    cls = selector_class(name)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for field in fields:
        if field not in known:
            raise ValueError(f"method {name!r} has no field {field!r}, its fields are {known}")
    required = {f.name for f in dataclasses.fields(cls) if f.init and _has_no_default(f)}
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"method {name!r} lacks a value for {missing}, its fields are {known}")
    types = get_type_hints(cls)
    for field, value in fields.items():
        try:
            TypeAdapter(types[field]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"method {name!r}, {field}: {error.errors()[0]['msg']}, got {value!r}") from error
    selector = cls(**fields)
    if not isinstance(selector, Selector):
        raise TypeError(f"{cls.__name__} in methods/{name}.py does not satisfy the Selector protocol")
    return selector


def _is_frozen_dataclass(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
