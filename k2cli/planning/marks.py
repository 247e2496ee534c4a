"""How sure a number of a plan is. A leaf: hardware, speed and plan all say it of their numbers."""

from __future__ import annotations

from typing import Literal

Mark = Literal["exact", "modelled", "assumed"]
"""How a number came about: traced or read, computed by a model, or taken as given."""
