"""Finds stop strings in text that arrives in pieces, in time linear in the text (Aho and Corasick, 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class _Node:
    """A prefix of one or more stop strings."""

    __slots__ = ("depth", "fallback", "longest_match", "next")

    def __init__(self, depth: int) -> None:
        self.next: dict[str, _Node] = {}
        self.fallback: _Node = self  # the longest proper suffix that is a prefix too
        self.depth = depth
        self.longest_match = ""  # the longest stop string that ends here


class StopStringMatcher:
    """Watches a text for the first of several stop strings.

    The match is the stop string that is complete first; of two that end with the same letter, the longer
    one. So the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Raises ValueError if a stop string is empty."""
        if not all(stop):
            raise ValueError("a stop string is empty")
        self._root = _Node(0)
        self._first_letters = frozenset(text[0] for text in stop)
        for text in stop:
            node = self._root
            for letter in text:
                node = node.next.setdefault(letter, _Node(node.depth + 1))
            node.longest_match = text
        self._link()
        self._node = self._root

    def _link(self) -> None:
        queue = deque([self._root])
        while queue:
            node = queue.popleft()
            for letter, child in node.next.items():
                queue.append(child)
                if node is self._root:
                    child.fallback = self._root
                    continue
                suffix = node.fallback
                while letter not in suffix.next and suffix is not self._root:
                    suffix = suffix.fallback
                child.fallback = suffix.next.get(letter, self._root)
                child.longest_match = child.longest_match or child.fallback.longest_match

    @property
    def num_held(self) -> int:
        """Letters at the end of the text so far that may be the start of a stop string."""
        return self._node.depth

    def feed(self, text: str) -> tuple[int, str] | None:
        """Goes on with the next piece.

        Returns:
            Where in ``text`` a stop string ends and which one it is, or None.
        """
        root = node = self._root
        if self._node is root and self._first_letters.isdisjoint(text):
            return None
        node = self._node
        for position, letter in enumerate(text, 1):
            while (following := node.next.get(letter)) is None and node is not root:
                node = node.fallback
            node = root if following is None else following
            if node.longest_match:
                self._node = root
                return position, node.longest_match
        self._node = node
        return None
