"""Shapes in signatures, ``Float[Tensor, "*batch d"]``: those of jaxtyping, or without it the type alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Float", "Int"]

if TYPE_CHECKING:
    from jaxtyping import Float, Int
else:
    try:
        from jaxtyping import Float, Int
    except ModuleNotFoundError:

        class Float:
            """``Float[Tensor, "*batch d"]`` is ``Tensor``."""

            def __class_getitem__(cls, type_and_shape: tuple[Any, str]) -> Any:
                return type_and_shape[0]

        class Int(Float):
            """As `Float`."""
