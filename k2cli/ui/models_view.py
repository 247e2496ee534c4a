"""Tables of the models on machines, and what is removed of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from k2cli.ui.output import note, print_line
from k2cli.units import format_bytes, one_line

if TYPE_CHECKING:
    from k2cli.agent.weights.stored_models import Removal
    from k2cli.models.inventory.prune import PruneResult
    from k2cli.models.inventory.stored_model import StoredModel, StoredModels

_WIDTH = 80
_COMMIT_LETTERS = 8
_STATES = {"config": "config only", "other": "not for k2"}
_WRITING = {"download": "downloading", "push": "receiving"}


def print_models(answers: Sequence[tuple[str, StoredModels]], *, show_nodes: bool) -> None:
    """Print a line per revision; below it what is missing, its verification and its runs."""
    rows = [(node, model) for node, answer in answers for model in answer.models]
    if not rows:
        where = "on these machines" if show_nodes else "on this machine"
        note(f"no models {where}; get one with: k2 download demo")
    else:
        if show_nodes:
            rows.sort(key=lambda row: row[1].label.lower())
        _print_table([_Row(node, model, show_nodes) for node, model in rows], show_nodes)
        total = sum(answer.bytes for _, answer in answers)
        text = f"\n{format_bytes(total)} in all"
        if any(model.added_bytes != model.bytes for _, model in rows):
            text += "; + is what a revision adds to the one above, with which it shares files"
        note(text)
    if left := sum(answer.leftover_bytes for _, answer in answers):
        note(f"{format_bytes(left)} belong to none of them: k2 models prune --dry-run")


class _Row:
    """The cells of one model, and the line below them."""

    def __init__(self, node: str, model: StoredModel, show_node: bool) -> None:
        name = one_line(model.label)
        size = format_bytes(model.added_bytes)
        if model.added_bytes != model.bytes:
            size = f"+{size}"
        cells = [one_line(model.commit[:_COMMIT_LETTERS]) or "-", model.format or "-"]
        state = _WRITING.get(model.writer, _STATES.get(model.state, model.state))
        self.name = name
        self.cells = [*([node] if show_node else []), *cells, size.rjust(9), state]
        self.below = _below(model)


def _print_table(rows: Sequence[_Row], show_nodes: bool) -> None:
    heads = [*(["NODE"] if show_nodes else []), "REVISION", "FORMAT", "     SIZE", "STATE"]
    every = [heads, *(row.cells for row in rows)]
    widths = [max(len(cells[column]) for cells in every) for column in range(len(heads))]
    room = _WIDTH - sum(width + 2 for width in widths)
    fitting = [len(row.name) for row in rows if len(row.name) <= room]
    first = max([*fitting, len("MODEL")])
    _print_row("MODEL", first, heads, widths)
    for row in rows:
        if len(row.name) > first:
            print_line(row.name)
            _print_row("", first, row.cells, widths)
        else:
            _print_row(row.name, first, row.cells, widths)
        if row.below:
            print_line(f"  {row.below}")


def _print_row(name: str, width: int, cells: Sequence[str], widths: Sequence[int]) -> None:
    padded = [cell.ljust(size) for cell, size in zip(cells, widths, strict=True)]
    print_line("  ".join([name.ljust(width), *padded]).rstrip())


def _below(model: StoredModel) -> str:
    parts = []
    if model.missing_bytes:
        place = "of it are on other machines" if model.state == "part" else "missing"
        parts.append(f"{format_bytes(model.missing_bytes)} {place}")
    if model.verified is not None:
        parts.append(f"verified {_date(model.verified.time)}")
    if model.used_by:
        parts.append(f"used by {', '.join(model.used_by)}")
    return "; ".join(parts)


def _date(seconds: float, form: str = "%Y-%m-%d") -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime(form)
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def print_model(answers: Sequence[tuple[str, Removal]], *, show_nodes: bool) -> None:
    """Print all that is known about each revision of a model, and its files."""
    blank = ""
    for node, answer in answers:
        if not answer.models:
            note(f"node {node}: {answer.problem}")
        for model in answer.models:
            if blank:
                print_line("")
            blank = "\n"
            _print_one(model, node if show_nodes else "")


def _print_one(model: StoredModel, node: str) -> None:
    aliases = ", ".join(name for name in model.aliases if name != model.label)
    shown = [
        ("node", node),
        ("repository", model.repo if model.repo != model.label else ""),
        ("alias", aliases),
        ("revision", f"{model.commit} {' '.join(model.references)}".strip()),
        ("folder", model.folder),
        ("made from", model.source),
        ("architecture", model.architecture),
        ("quantization", model.quantization),
        ("size", _size_text(model)),
        ("state", _state_text(model)),
        ("verified", _verified_text(model)),
        ("used by", ", ".join(f"{run} (k2 stop {run})" for run in model.used_by)),
    ]
    print_line(model.label)
    for name, value in shown:
        if value:
            print_line(f"  {name:<13} {one_line(value)}")
    for file in model.files:
        state = ""
        if file.partial_bytes:
            state = f"  ({format_bytes(file.partial_bytes)} are here)"
        elif not file.is_here:
            state = "  (missing)"
        print_line(f"  {format_bytes(file.bytes):>9}  {one_line(file.name)}{state}")


def _size_text(model: StoredModel) -> str:
    text = format_bytes(model.bytes)
    elsewhere = model.bytes - sum(f.bytes if f.is_here else f.partial_bytes for f in model.files)
    if model.kind == "converted" and model.source and elsewhere > 0:
        text += f", of which {format_bytes(elsewhere)} are the file that it is made from"
    if model.own_bytes != model.bytes:
        text += f", of which {format_bytes(model.own_bytes)} are of this revision alone"
    return text


def _state_text(model: StoredModel) -> str:
    text = _STATES.get(model.state, model.state)
    if model.missing_bytes:
        text += f", {format_bytes(model.missing_bytes)} are not here"
    return text + (f", a {model.writer} is running" if model.writer else "")


def _verified_text(model: StoredModel) -> str:
    if model.verified is None:
        whole = model.state in ("complete", "part") and model.repo
        return f"not known; to do it: k2 models verify {model.name}" if whole else ""
    how = {"download": "its download", "push": "a push", "verify": "k2 models verify"}
    return f"{_date(model.verified.time, '%Y-%m-%d %H:%M')}, by {how[model.verified.by]}"


def print_removal(answers: Sequence[tuple[str, Removal]]) -> None:
    """Say on stderr what is about to be removed, and how many bytes that frees."""
    for node, answer in answers:
        where = f" on {node}" if node != "localhost" else ""
        for model in answer.models:
            commit = f" {model.commit[:_COMMIT_LETTERS]}" if model.commit else ""
            names = f" ({', '.join(model.references)})" if model.references else ""
            note(f"{model.label}{commit}{names}{where}: {model.folder}")
        total = sum(model.bytes for model in answer.models)
        shared = " at most" if total < answer.freed_bytes else ""
        note(f"  frees{shared} {format_bytes(answer.freed_bytes)}")


def print_removed(model: str, answers: Sequence[tuple[str, Removal]]) -> None:
    """Print what was freed on each machine."""
    for node, answer in answers:
        where = f" on {node}" if node != "localhost" else ""
        print_line(f"removed {model}{where}: {format_bytes(answer.freed_bytes)} freed")


def print_prunable(answers: Sequence[tuple[str, PruneResult]], *, show_nodes: bool) -> None:
    """Print a line for each thing that nothing needs, with its bytes; notes go to stderr."""
    for node, result in answers:
        where = f"{node}: " if show_nodes else ""
        for item in result.items:
            last = item.path.rpartition("/")[2]
            name = last if len(last) <= 24 else f"{last[:8]}...{last[-12:]}"
            shown = f" ({name})" if item.what not in ("revision", "content") else ""
            print_line(f"{format_bytes(item.bytes):>9}  {where}{item.name}: {item.why}{shown}")
        for text in result.kept:
            note(f"kept: {where}{one_line(text)}")
    total = sum(item.bytes for _, result in answers for item in result.items)
    if any(result.items for _, result in answers):
        note(f"{format_bytes(total):>9}  in all")
    else:
        note("nothing to remove")
