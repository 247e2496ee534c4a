"""The catalog: shapes compared with published parameter counts and sizes, and its page."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

import pytest

from benchmarks import model_table
from k2cli.errors import UsageError
from k2cli.models.catalog import CatalogEntry, HubSource, catalog, shapes
from k2cli.models.inspection import inspect_model
from k2cli.planning.config_check import check_config, text_config

NOT_IN_MLX_LM = {"deepseek-v4-flash", "deepseek-v4-pro"}
"""Shapes of models that cannot run, which k2 carries to say so at once."""

VISION_BYTES = 1_000_000_000
"""Published sizes count a vision tower, at most half a billion parameters in bf16."""

HEADER_SHARE, FILES_BYTES = 1e-4, 20_000_000
"""Published totals count headers, some a tokenizer's files, and keep routers' biases in float32."""

UNEXPLAINED = {"k3": 0.005}
"""Difference beyond rounding: 7 GB of Kimi K3. Packed projections into the experts' narrower space
would explain it, but its config does not say if they are packed."""

EXACT = re.compile(
    r"glm-4\.7-[468]bit|glm-5-(bf16|mxfp8)|nemotron-(70b|3-nano-30b)-\dbit|minimax-m2\.[15]-\dbit"
)
"""Published to the byte, as the sum over their tensors: equal to the byte."""

CARRIED = [entry for entry in catalog().values() if entry.config_folder is not None]
TRACED = [e for e in CARRIED if e.config_folder and e.config_folder.name not in NOT_IN_MLX_LM]


def rounding(size: int) -> float:
    """Return half a unit of the last published digit; 0 if the number was not rounded."""
    digits = str(size)
    zeros = len(digits) - len(digits.rstrip("0"))
    return 10**zeros / 2 if zeros > 3 else 0.0


def has_vision(entry: CatalogEntry) -> bool:
    """True if the repository holds a vision tower beside the model that k2 plans."""
    config = inspect_model(entry.alias).config
    return "text_config" in config


def test_every_carried_shape_has_its_source_and_every_source_its_shape() -> None:
    assert {entry.config_folder.name for entry in CARRIED if entry.config_folder} == set(shapes())
    for name, shape in shapes().items():
        assert shape.source.startswith("https://"), name
        assert (shape.published_parameters is None) == (shape.published_in is None), name


@pytest.mark.parametrize("name", sorted(shapes().keys() - NOT_IN_MLX_LM))
def test_traced_parameters_are_those_that_were_published(name: str) -> None:
    entry = next(e for e in TRACED if e.config_folder and e.config_folder.name == name)
    published = shapes()[name].published_parameters
    assert published is not None
    assert model_table.trace(entry).parameters == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "entry", [e for e in TRACED if e.stored_bytes is not None], ids=lambda e: e.alias
)
def test_sizes_are_those_that_were_published(entry: CatalogEntry) -> None:
    assert entry.stored_bytes is not None
    assert entry.size_source is not None
    computed = model_table.trace(entry).stored_bytes
    off = entry.stored_bytes - computed
    if EXACT.fullmatch(entry.alias):
        assert off == 0
    allowed = max(
        FILES_BYTES,
        rounding(entry.stored_bytes),
        entry.stored_bytes * UNEXPLAINED.get(entry.alias, HEADER_SHARE),
    )
    if has_vision(entry):
        assert -allowed <= off <= VISION_BYTES + allowed
    else:
        # gpt-oss was published in GiB with one decimal.
        tenth = 2**30 / 10 if entry.alias.startswith("gpt-oss") else 0
        assert abs(off) <= max(allowed, tenth)


def test_a_published_config_is_not_refused_before_it_is_traced() -> None:
    for entry in TRACED:
        config = inspect_model(entry.alias).config
        names = frozenset({"kv_lora_rank"} & text_config(config).keys())
        check_config(config, entry.alias, names)


def test_every_name_stands_under_one_heading() -> None:
    starts = [start for family in model_table.FAMILIES.values() for start in family]
    for alias in catalog():
        assert sum(alias.startswith(start) for start in starts) == 1, alias


@pytest.mark.parametrize("alias", sorted(NOT_IN_MLX_LM))
def test_an_architecture_that_mlx_lm_lacks_is_named(alias: str) -> None:
    from k2cli.planning.model import read_model

    with pytest.raises(UsageError, match="'deepseek_v4' is not one that the installed mlx-lm"):
        read_model(alias)


def test_aliases_with_a_shape_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", _refuse)
    for entry in CARRIED:
        config = inspect_model(entry.alias).config
        wanted = entry.overrides.get("quantization")
        assert wanted is None or config["quantization"] == wanted


def _refuse(*_: object, **__: object) -> Callable[[], None]:
    raise AssertionError("a carried shape asked the network")


def test_no_repository_has_two_names() -> None:
    repos = [e.source.repo for e in catalog().values() if isinstance(e.source, HubSource)]
    assert len(repos) == len(set(repos))


def test_the_page_of_models_is_up_to_date() -> None:
    assert model_table.PAGE.read_text(encoding="utf-8") == model_table.page(), (
        "run scripts/model-table"
    )
