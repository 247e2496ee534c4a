"""The lines of the live view above its tables, and its last line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from k2cli.ui.chat.width import cut, text_width
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
    wrapped,
)
from k2cli.units import format_duration

if TYPE_CHECKING:
    from k2cli.client.status_document import StatusDocument, StatusKvCache, StatusTotals
    from k2cli.ui.top.state import TopState

_LABEL_WIDTH = 10
_NARROW = 60
_MOST_SPARKLINE = 120
_MOST_INTERFACES = 64
_KEYS = ("q leave  up/down, page up/down scroll", "q leave  up/down", "q leave")
_STATES = {"ready": GOOD, "starting": WARNING, "restarting": WARNING, "stopping": BAD}
_RESULTS = {"completed": "", "client_gone": "", "invalid": WARNING, "unauthorized": WARNING,
            "refused": WARNING, "failed": BAD}  # fmt: skip
_WORDS = {"client_gone": "left by the client", "unauthorized": "without a right key"}


def title_lines(state: TopState, now: float, width: int) -> list[Text]:
    """Return the name of the model and the state of the run, with the reason if it is not ready."""
    document, silent = state.document, state.silent_seconds(now)
    if document is None:
        lines = packed([Text("k2 top", LABEL), name(state.place)], width, "  ")
    else:
        shown = "no answer" if silent is not None else name(document.state)
        parts: list[Text | str] = [
            Text(name(document.model.name), LABEL),
            Text(shown, BAD if silent is not None else _STATES.get(document.state, WARNING)),
            f"up {format_duration(max(0.0, document.uptime_seconds))}",
            _restarts(document.attempt),
            name(document.run_id),
            # A run of this machine may have been followed by another one.
            name(state.place) if "://" in state.place and width >= 2 * _NARROW else "",
        ]
        lines = packed([part for part in parts if part], width, "  ")
    return [*lines, *_problem(state, silent, width)]


def _restarts(attempt: int) -> Text:
    count = max(0, attempt - 1)
    return Text(f"{count} restart{'' if count == 1 else 's'}", WARNING if count else "")


def _problem(state: TopState, silent: float | None, width: int) -> list[Text]:
    document = state.document
    if silent is not None:
        reason = name(state.problem) if state.problem else "it has not come yet"
        verb = "no answer" if document is not None else "waiting"
        text = f"{verb} for {age_text(max(1, silent))}: {reason}"
        return wrapped(text, width, 3, BAD if document is not None else WARNING)
    if document is None:
        return [Text("waiting for the first answer"[:width], WARNING)]
    if document.state != "ready" and document.cause:
        return wrapped(name(document.cause), width, 3, WARNING)
    return []


def overview_lines(state: TopState, document: StatusDocument, look: Look, width: int) -> list[Text]:
    """Return the link, the rates with their history, the KV cache, and the counts of requests."""
    labelled: list[tuple[str, Callable[[int], list[Text]]]] = [
        ("link", lambda room: _link(document, room)),
        ("tokens/s", lambda room: _rates(state, document, look, room)),
        ("KV cache", lambda room: _kv_cache(document.kv_cache, look, room)),
        ("cache hits", lambda room: _cache_hits(document.totals, room)),
        ("requests", lambda room: _counts(document, room)),
        ("ended", lambda room: _ended(document.totals, room)),
    ]
    lines = []
    indent = _LABEL_WIDTH + 2
    for label, draw in labelled:
        if width < 2 * indent:
            lines += [Text(label, LABEL), *draw(width)]
            continue
        for index, content in enumerate(draw(width - indent)):
            head = ("" if index else label).ljust(indent)
            lines.append(Text().append(head, LABEL).append_text(content))
    return lines


def _link(document: StatusDocument, width: int) -> list[Text]:
    link = document.link
    if len(document.ranks) < 2:
        parts = ["one rank, no link"]
    else:
        nodes = len({rank.node for rank in document.ranks})
        known = [name(part) for part in (link.transport, link.strategy) if part]
        many = f"{len(document.ranks)} ranks on {nodes} node{'' if nodes == 1 else 's'}"
        parts = [*known, many, *map(name, link.interfaces[:_MOST_INTERFACES])]
        if link.reason and width > _NARROW:
            parts.append(f"reason: {name(link.reason)}")
    return packed(parts, width)


def _rates(state: TopState, document: StatusDocument, look: Look, width: int) -> list[Text]:
    rates = document.throughput
    generated = f"{rate_text(rates.completion_tokens_per_second)} generated"
    parts: list[Text | str] = [Text(generated, LABEL)]
    parts.append(f"{rate_text(rates.prompt_tokens_per_second)} of prompts")
    samples = list(state.history)[-min(_MOST_SPARKLINE, max(1, width - 24)) :]
    known = [s.tokens_per_second for s in samples if s.tokens_per_second is not None]
    highest = max(known, default=0.0)
    seconds = samples[-1].at - samples[0].at if samples else 0.0
    columns = look.sparkline([s.tokens_per_second for s in samples], highest)
    line = Text().append(columns, GOOD)
    line.append(f"  max {rate_text(highest)} in {format_duration(max(1.0, seconds))}", DIM)
    return [*packed(parts, width), Text(cut(line.plain, width)) if len(line) > width else line]


def _kv_cache(cache: StatusKvCache | None, look: Look, width: int) -> list[Text]:
    if cache is None:
        return [Text("not known yet")]
    taken = [cache.reserved_tokens, cache.prefix_tokens]
    share = f"{percent_text(sum(taken), cache.budget_tokens)} of {cache.budget_tokens:,} tokens"
    size = min(40, width - len(share) - 2)
    lines = packed([share], width)
    if size >= 8:
        bar = look.bar(taken, cache.budget_tokens, size, PARTS)
        lines = [bar.append(f"  {share}")]
    prompts = f"prompt{'' if cache.prefixes == 1 else 's'}"
    return lines + packed(
        [
            f"{cache.reserved_tokens:,} reserved by requests",
            f"{cache.prefix_tokens:,} in {cache.prefixes:,} kept {prompts}",
        ],
        width,
    )


def _cache_hits(totals: StatusTotals, width: int) -> list[Text]:
    parts = []
    if totals.cache_hits is not None:
        started = totals.queue.count
        parts.append(f"{totals.cache_hits:,} of {started:,} request{'' if started == 1 else 's'}")
    parts.append(
        f"{percent_text(totals.cached_tokens, totals.prompt_tokens)} of prompt tokens"
        if totals.prompt_tokens
        else "no prompt yet"
    )
    return packed(parts, width)


def _counts(document: StatusDocument, width: int) -> list[Text]:
    requests = document.requests
    parts: list[Text | str] = [f"{requests.decode} decode", f"{requests.prefill} prefill"]
    queued = f"{requests.queued} queued"
    if requests.queued:
        queued += f" (oldest {format_duration(max(0.0, requests.oldest_wait_seconds))})"
    parts.append(Text(queued, WARNING if requests.queued else ""))
    if requests.reading:
        parts.append(f"{requests.reading} reading")
    return packed(parts, width)


def _ended(totals: StatusTotals, width: int) -> list[Text]:
    known: list[Text | str] = [
        Text(f"{count:,} {_WORDS.get(result, result)}", style if count else "")
        for result, style in _RESULTS.items()
        if (count := totals.requests.get(result, 0)) or result == "completed"
    ]
    return packed(known, width)


def help_lines(width: int, hidden: tuple[int, int], look: Look) -> Iterator[Text]:
    """Yield the last line: the keys, and the number of lines above and below the shown ones."""
    above, below = hidden
    parts = [f"{look.up}{above}"] if above else []
    parts += [f"{look.down}{below}"] if below else []
    counts = "  ".join(parts)
    room = width - text_width(counts) - 2
    usable = _KEYS if counts else _KEYS[-1:]
    keys = next((text for text in usable if len(text) <= room), "")
    gap = max(0, width - text_width(keys) - text_width(counts))
    yield Text(cut(keys + " " * gap + counts, width).rstrip(), DIM)
