"""The leader's directory of kept prefixes: token sequences whose KV cache every rank keeps.

The prefixes of a scope form a radix tree: each node has its own tokens and stands for the sequence
from the root to its last token, so that what several conversations share is kept once. Models whose
caches cannot be cut back keep whole sequences instead: each is a node without a parent.

It holds tokens only; the caches are on the ranks under the same ids. The leader decides which
prefixes to keep, split, use again and drop, and sends decisions, so that all ranks do the same.

Each prefix belongs to a scope, and only requests of that scope find it: the time to the first token
would otherwise tell the user of one key what that of another has asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

# Array type of one token in the directory.
_TOKEN = "q"
_TOKEN_BYTES = 8
# Copying a cache of fewer tokens takes about as long as computing it again.
LEAST_REUSE_TOKENS = 8

NODE_STEP_TOKENS = 64
"""What a node holds is counted in whole steps: the arrays of a node have its exact length, and an
allocation is rounded up to a page (16 KB), about 64 tokens of a layer's smaller array."""

EXTENDED_TOKENS = 256
"""A leaf with fewer tokens becomes part of the longer one that continues it. Otherwise each turn of
a conversation would be a node, and steps of many short ones would waste memory."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A kept prefix that a prompt begins with: its id, and the number of shared tokens."""

    prefix: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a sequence in the tree: its first ``start`` tokens are kept already.

    They end inside ``split``, after ``split_tokens`` of that node's own; else with ``below``, None
    for the root. ``replaced`` is a leaf that the new node will contain.
    """

    start: int = 0
    below: int | None = None
    split: int | None = None
    split_tokens: int = 0
    replaced: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class _Node:
    """``tokens`` are its own, ``start`` counts those of its parents. ``used`` orders by use."""

    id: int
    scope: str
    parent: _Node | None
    start: int
    tokens: bytes
    used: int
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.tokens) // _TOKEN_BYTES

    @property
    def path(self) -> Iterator[_Node]:
        """The node and all above it, from the lowest to the root."""
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent


class PrefixTree:
    """Kept token sequences, found by their beginning."""

    def __init__(self, *, whole_only: bool) -> None:
        """Keep whole sequences only if ``whole_only``: their caches cannot be cut back."""
        self.whole_only = whole_only
        self._nodes: dict[int, _Node] = {}
        self._roots: dict[str, dict[int, _Node]] = {}
        self._next_id = 0
        self._uses = 0
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, prefix: int) -> bool:
        return prefix in self._nodes

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def tokens(self) -> int:
        """Return the tokens that all kept prefixes take, each node once, in whole steps."""
        return self._tokens

    def tokens_of(self, prefixes: Collection[int]) -> int:
        """Return the tokens that those of these prefixes take which are still kept."""
        kept = (self._nodes[prefix] for prefix in prefixes if prefix in self._nodes)
        return sum(self._taken(node) for node in {node for one in kept for node in one.path})

    def _taken(self, node: _Node) -> int:
        return cache_tokens(node.length) if self.whole_only else node_tokens(node.length)

    @property
    def count_added(self) -> int:
        """The number of nodes that were ever added."""
        return self._next_id

    # --- finding ---------------------------------------------------------------------------------

    def best(self, prompt: Sequence[int], scope: str = "") -> Hit | None:
        """Find the kept prefix that saves most of a prompt, and make it the most recently used."""
        best = self.find(prompt, scope)
        if best is not None:
            self.use(best.prefix)
        return best

    def find(self, prompt: Sequence[int], scope: str = "") -> Hit | None:
        """Find the kept prefix that saves most of a prompt, whose last token is always computed."""
        node, shared = self._walk(_kept(prompt[:-1]), scope)
        if node is None or shared < LEAST_REUSE_TOKENS:
            return None
        return Hit(node.id, shared)

    def use(self, prefix: int) -> None:
        """Make a prefix the most recently used."""
        self._uses += 1
        for node in self._nodes[prefix].path:
            node.used = self._uses

    def _walk(self, wanted: bytes, scope: str) -> tuple[_Node | None, int]:
        """Return the node that shares most with the wanted tokens, and how many those are."""
        if self.whole_only:
            whole = [
                node
                for node in self._roots.get(scope, {}).values()
                if wanted.startswith(node.tokens)
            ]
            longest = max(whole, key=lambda node: node.length, default=None)
            return longest, 0 if longest is None else longest.length
        found, shared = None, 0
        children = self._roots.get(scope, {})
        while shared < len(wanted):
            child = children.get(_first(wanted, shared))
            if child is None:
                break
            same = common_length(child.tokens, wanted[shared : shared + len(child.tokens)])
            same -= same % _TOKEN_BYTES
            found, shared, children = child, shared + same, child.children
            if same < len(child.tokens):
                break
        return found, shared // _TOKEN_BYTES

    def path_tokens(self, prefix: int) -> list[int]:
        """Return the tokens of the sequence that a prefix stands for."""
        pieces = [node.tokens for node in self._nodes[prefix].path]
        return list(array(_TOKEN, b"".join(reversed(pieces))))

    def path_of(self, prefix: int | None) -> set[int]:
        """Return the nodes from a prefix to the root; none if it is not kept."""
        return (
            set() if prefix not in self._nodes else {node.id for node in self._nodes[prefix].path}
        )

    def scope_of(self, prefix: int) -> str:
        """Return the scope that a prefix belongs to."""
        return self._nodes[prefix].scope

    # --- changes ---------------------------------------------------------------------------------

    def place(self, tokens: Sequence[int], scope: str = "", *, extend: bool = True) -> Place | None:
        """Find where a new sequence belongs; None if too little of it is new to be kept.

        Args:
            extend: the new node may contain a short leaf that it continues.
        """
        if len(tokens) < LEAST_REUSE_TOKENS:
            return None
        if self.whole_only:
            return self._place_whole(_kept(tokens), scope)
        node, shared = self._walk(_kept(tokens), scope)
        if len(tokens) - shared < LEAST_REUSE_TOKENS:
            return None
        if node is None:
            return Place()
        inside = shared - node.start
        if inside < node.length:
            return Place(shared, split=node.id, split_tokens=inside)
        if extend and not node.children and node.length < EXTENDED_TOKENS:
            above = None if node.parent is None else node.parent.id
            return Place(node.start, above, replaced=(node.id,))
        return Place(shared, node.id)

    def _place_whole(self, wanted: bytes, scope: str) -> Place | None:
        kept = list(self._roots.get(scope, {}).values())
        contained = [node.id for node in kept if wanted.startswith(node.tokens)]
        if any(node.tokens == wanted for node in kept):
            return None
        return Place(replaced=tuple(contained))

    def split(self, prefix: int, tokens: int) -> int:
        """Make the first ``tokens`` of a node one of their own above it; return its id."""
        node = self._nodes[prefix]
        assert 0 < tokens < node.length
        self._tokens -= self._taken(node)
        size = tokens * _TOKEN_BYTES
        above = self._added(node.scope, node.parent, node.start, node.tokens[:size], node.used)
        node.parent, node.start, node.tokens = above, node.start + tokens, node.tokens[size:]
        above.children[self._key(node)] = node
        self._tokens += self._taken(node)
        return above.id

    def add(self, tokens: Sequence[int], scope: str = "", below: int | None = None) -> int:
        """Add a node of these tokens below another; return the id of its cache on every rank."""
        parent = None if below is None else self._nodes[below]
        start = 0 if parent is None else parent.start + parent.length
        node = self._added(scope, parent, start, _kept(tokens), self._uses)
        self.use(node.id)
        return node.id

    def _added(
        self, scope: str, parent: _Node | None, start: int, tokens: bytes, used: int
    ) -> _Node:
        self._next_id += 1
        node = _Node(self._next_id, scope, parent, start, tokens, used)
        self._siblings(node)[self._key(node)] = node
        self._nodes[node.id] = node
        self._tokens += self._taken(node)
        return node

    def _siblings(self, node: _Node) -> dict[int, _Node]:
        if node.parent is not None:
            return node.parent.children
        return self._roots.setdefault(node.scope, {})

    def _key(self, node: _Node) -> int:
        return node.id if self.whole_only else _first(node.tokens, 0)

    def oldest(self, spared: Collection[int] = ()) -> int | None:
        """Return the least recently used prefix that no other continues; None if there is none.

        Those that are ``spared`` are returned only if there are no others.
        """
        leaves = (node for node in self._nodes.values() if not node.children)
        first = min(leaves, key=lambda node: (node.id in spared, node.used), default=None)
        return None if first is None else first.id

    def remove(self, prefix: int) -> None:
        """Remove a prefix that no other continues."""
        node = self._nodes.pop(prefix)
        assert not node.children
        siblings = self._siblings(node)
        del siblings[self._key(node)]
        if node.parent is None and not siblings:
            del self._roots[node.scope]
        self._tokens -= self._taken(node)


def _kept(tokens: Sequence[int]) -> bytes:
    return array(_TOKEN, tokens).tobytes()


def _first(tokens: bytes, at: int) -> int:
    return int(array(_TOKEN, tokens[at : at + _TOKEN_BYTES])[0])


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning of tokens, or of their bytes."""
    same, limit = 0, min(len(one), len(other))
    while same < limit:
        # Bisection; each item is compared about twice.
        middle = (same + limit + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same


def node_tokens(tokens: int) -> int:
    """Round up to the tokens that a node of the tree is counted with."""
    return cache_tokens(tokens, NODE_STEP_TOKENS)


def cache_tokens(tokens: int, step: int = 256) -> int:
    """Round up to the tokens that mlx-lm's KV caches allocate room for: whole steps of 256."""
    return -(-tokens // step) * step
