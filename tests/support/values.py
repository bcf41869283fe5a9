"""Small helpers that say to a type checker, and to a reader of a failure, what a value is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def there(value: T | None) -> T:
    """The value, which must not be None."""
    assert value is not None
    return value


def named(name: object) -> Callable[[str], str]:
    """For ``msg`` of ``torch.testing.assert_close``: its message after the name of what differs."""
    return lambda message: f"{name}: {message}"
