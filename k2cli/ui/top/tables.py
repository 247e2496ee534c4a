"""The tables of the live view: ranks with their memory, requests with their progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from k2cli.ui.top.columns import Column, table, text_column
from k2cli.ui.top.look import (
    BAD,
    DIM,
    GOOD,
    LABEL,
    PARTS,
    WARNING,
    Look,
    age_text,
    name,
    packed,
    percent_text,
    rate_text,
)
from k2cli.units import format_bytes

if TYPE_CHECKING:
    from k2cli.client.status_document import StatusDocument, StatusRank, StatusRequest

_MOST_RANKS = 64
_MOST_REQUESTS = 256
"""More than a server of k2 lists; others could stop the view with a hundred thousand."""

_STALLED_SECONDS = 10.0
_PHASES = {"computing a new shape": "new shape", "initialising": "starting", "": "-"}


def rank_lines(document: StatusDocument, look: Look, width: int) -> list[Text]:
    """Return the table of ranks, with their memory beside the plan."""
    ranks = document.ranks[:_MOST_RANKS]
    many = len(document.ranks) > 1
    stalled = [(rank.progress_age_seconds or 0) > _STALLED_SECONDS for rank in ranks]
    still = [
        Text(age_text(rank.progress_age_seconds), BAD if late else "")
        for rank, late in zip(ranks, stalled, strict=True)
    ]
    peaks = [format_bytes(rank.memory.peak_bytes) for rank in ranks]
    residents = [format_bytes(rank.memory.resident_bytes) for rank in ranks]
    columns = [
        text_column("RANK", [str(rank.rank) for rank in ranks], 8, right=True),
        text_column("NODE", [name(rank.node) for rank in ranks], 9, least=8),
        text_column("GPU", [name(rank.gpu) for rank in ranks], 2, least=12),
        text_column("STATE", [_phase(rank) for rank in ranks], 9),
        text_column("STILL", still, 5 if any(stalled) else 1, right=True),
        text_column("LAYERS", [_layers(rank) for rank in ranks], 4),
        Column(
            "MEMORY", lambda size: [_memory_bar(r, look, size) for r in ranks], 8, 40, 7, bar=True
        ),
        text_column("", [_memory_share(rank) for rank in ranks], 9, right=True),
        text_column("OF PLAN", [_memory_bytes(rank) for rank in ranks], 6),
        text_column("PEAK", peaks, 3, right=True),
        text_column("PROCESS", residents, 0, right=True),
    ]
    if not any(rank.gpu for rank in ranks):
        columns = [column for column in columns if column.title != "GPU"]
    heading = Text(f"{len(document.ranks)} rank{'s' if many else ''}", LABEL)
    legend = "{} arrays, {} freed and kept, {} rest of the plan".format(*look.cells)
    lines = [*packed([heading, Text(legend, DIM)], width, "  "), *table(columns, width, DIM)]
    if len(ranks) < len(document.ranks):
        lines.append(Text(f"{len(document.ranks) - len(ranks)} more are not shown"))
    return lines


def _phase(rank: StatusRank) -> Text:
    if rank.phase == "loading" and rank.load_bytes:
        return Text(f"loading {percent_text(rank.loaded_bytes, rank.load_bytes)}", WARNING)
    phase = name(_PHASES.get(rank.phase, rank.phase))
    return Text(phase, GOOD if phase in ("busy", "idle", "waiting") else WARNING)


def _layers(rank: StatusRank) -> str:
    return "-" if rank.layers is None else f"{rank.layers[0]}-{max(0, rank.layers[1] - 1)}"


def _taken(rank: StatusRank) -> int:
    return rank.memory.used_bytes + rank.memory.kept_bytes


def _memory_bar(rank: StatusRank, look: Look, width: int) -> Text:
    memory = rank.memory
    parts = [memory.used_bytes, memory.kept_bytes]
    return look.bar(parts, memory.planned_bytes, width, PARTS)


def _memory_share(rank: StatusRank) -> Text:
    over = _taken(rank) > rank.memory.planned_bytes > 0
    return Text(percent_text(_taken(rank), rank.memory.planned_bytes), BAD if over else "")


def _memory_bytes(rank: StatusRank) -> Text:
    planned = rank.memory.planned_bytes
    if not planned:
        return Text(format_bytes(_taken(rank)))
    text = f"{format_bytes(_taken(rank))} of {format_bytes(planned)}"
    return Text(f"{text} over plan", BAD) if _taken(rank) > planned else Text(text)


def request_lines(document: StatusDocument, look: Look, width: int) -> list[Text]:
    """Return the table of requests, with their progress."""
    requests = document.requests
    listed = requests.listed[:_MOST_REQUESTS]
    total = requests.decode + requests.prefill + requests.queued + requests.reading
    heading = Text("no requests" if not total else f"{total} request{'s'[: total - 1]}", LABEL)
    if not listed:
        return [heading]
    columns = [
        text_column("KEY", [name(each.key) or "-" for each in listed], 9, least=6),
        text_column("STATE", [_request_state(each) for each in listed], 9),
        Column("PROMPT", lambda size: _prompt_bars(listed, look, size), 8, 24, 4, bar=True),
        _done_column(listed),
        text_column("CACHED", [f"{each.cached_tokens:,}" for each in listed], 3, right=True),
        text_column("TOKENS", [f"{each.generated_tokens:,}" for each in listed], 8, right=True),
        text_column("TOK/S", [_optional_rate(each) for each in listed], 6, right=True),
        text_column("AGE", [age_text(each.age_seconds) for each in listed], 5, right=True),
        text_column("API", [name(each.dialect) for each in listed], 1),
        text_column("ID", [name(each.id) for each in listed], 0, least=8),
    ]
    lines = [heading, *table(columns, width, DIM)]
    total = max(total, len(requests.listed))
    if len(listed) < total:
        lines.append(Text(f"{total - len(listed)} more are not listed"[:width]))
    return lines


def _request_state(request: StatusRequest) -> Text:
    if request.state == "queued":
        place = "" if request.queue_position is None else f" {request.queue_position}"
        return Text(f"queued{place}", WARNING)
    return Text(name(request.state), GOOD if request.state == "decode" else "")


def _prompt_bars(listed: Sequence[StatusRequest], look: Look, width: int) -> list[Text]:
    return [
        look.bar([each.prompt_tokens_done, 0], each.prompt_tokens, width, PARTS)
        if each.state in ("prefill", "queued")
        else Text()
        for each in listed
    ]


def _done_column(listed: Sequence[StatusRequest]) -> Column:
    """Return the tokens of the prompts that are done, as shares where these do not fit."""
    tokens = [_prompt(each) for each in listed]
    shares = [percent_text(each.prompt_tokens_done, each.prompt_tokens) for each in listed]
    natural = max(4, *map(len, tokens))

    def draw(width: int) -> list[Text]:
        return [Text(text) for text in (tokens if width >= natural else shares)]

    return Column("DONE", draw, max(4, *map(len, shares)), natural, 7, right=True)


def _prompt(request: StatusRequest) -> str:
    if request.prompt_tokens_done >= request.prompt_tokens:
        return f"{request.prompt_tokens:,}" if request.prompt_tokens else "-"
    return f"{request.prompt_tokens_done:,}/{request.prompt_tokens:,}"


def _optional_rate(request: StatusRequest) -> str:
    rate = request.tokens_per_second
    return "-" if rate is None else rate_text(rate)
