"""The recipe that a command line asks for: in one word, or by its parts."""

from __future__ import annotations

from k2cli.errors import UsageError
from k2cli.sharding.recipe import Recipe, parse_recipe, recipe_of


def chosen_recipe(
    text: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
) -> Recipe:
    """A recipe from ``--recipe``, or from ``--bits``, ``--group-size`` and ``--mode``.

    Raises:
        UsageError: if both are given, or MLX has no kernels for what is.
    """
    if text is None:
        return recipe_of(bits, group_size, mode or "affine")
    for option, value in (("--bits", bits), ("--group-size", group_size), ("--mode", mode)):
        if value is not None:
            raise UsageError(f"--recipe and {option} both say what to make", f"leave out {option}")
    return parse_recipe(text)
