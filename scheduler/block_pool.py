"""The KV blocks of the device: who holds them, and which prefixes they contain."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class BlockKey:
    """Names what a full block contains: its own tokens after the whole prefix before it.

    Attributes:
        digest: SHA-256 of the parent's digest and the tokens; the first block's parent is a digest of the
            model and the salt. Equal prefixes have equal digests.
        parent: key of the block before it, None for the first. Following it gives the exact prefix, so that a
            collision of digests is noticed. May be exchanged for an equal key.
    """

    __slots__ = ("cache_salt", "digest", "parent", "token_ids")

    def __init__(
        self, digest: bytes, token_ids: tuple[int, ...], cache_salt: str | None, parent: BlockKey | None
    ) -> None:
        self.digest = digest
        self.token_ids = token_ids
        self.cache_salt = cache_salt
        self.parent = parent

    def has_same_prefix(self, other: BlockKey) -> bool:
        """Compares tokens and salt, from the last block down to the first one that is the same object."""
        ours: BlockKey | None = self
        theirs: BlockKey | None = other
        while ours is not theirs:
            if ours is None or theirs is None:
                return False
            if ours.token_ids != theirs.token_ids or ours.cache_salt != theirs.cache_salt:
                return False
            ours, theirs = ours.parent, theirs.parent
        return True


class BlockPool:
    """Reference-counted blocks with an index of the prefixes they contain.

    A block nobody holds is free, but keeps its contents and its place in the index until it is allocated
    again: that is the prefix cache. Free blocks are allocated in this order: those without indexed contents,
    then, of the owner with the most of them, the least recently released ones; of one sequence the last block
    first, since a prefix is worth more than what follows it. So no owner can drive the others' prefixes out
    as long as they have fewer blocks than it has.

    Args:
        num_blocks: ids are 0 .. num_blocks - 1.
        block_size: tokens in a block.
        cache_seed: identifies the model whose keys and values the blocks hold.
        hash_function: bytes to digest. Wrong tokens are impossible even if it collides.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        cache_seed: str,
        hash_function: Callable[[bytes], bytes] = sha256,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._cache_seed = cache_seed
        self._hash = hash_function
        self._pack_tokens = struct.Struct(f"<{block_size}q").pack
        self._num_references = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks  # contents of indexed blocks
        self._index: dict[bytes, int] = {}
        # An OrderedDict is a queue from whose middle a block is taken in constant time, when a prefix is hit.
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # free, no contents
        self._kept: dict[str | None, OrderedDict[int, None]] = {}  # free with contents, by owner
        self._owners: list[str | None] = [None] * num_blocks  # of indexed blocks
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_indexed(self) -> int:
        return len(self._index)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend_keys(
        self, keys: list[BlockKey], token_ids: Sequence[int], cache_salt: str | None, num_blocks: int
    ) -> None:
        """Appends the keys of the next full blocks of ``token_ids`` until there are ``num_blocks``."""
        while len(keys) < num_blocks:
            parent = keys[-1] if keys else None
            start = len(keys) * self.block_size
            tokens = tuple(token_ids[start : start + self.block_size])
            root = parent.digest if parent else self._hash(repr((self._cache_seed, cache_salt)).encode())
            keys.append(BlockKey(self._hash(root + self._pack_tokens(*tokens)), tokens, cache_salt, parent))

    def match_prefix(
        self, keys: list[BlockKey], token_ids: Sequence[int], cache_salt: str | None, max_blocks: int
    ) -> list[int]:
        """The blocks that hold the longest indexed prefix of ``token_ids``, ``max_blocks`` at most.

        Takes no references: see ``allocate``. ``keys`` remembers the keys made on the way.
        """
        block_ids: list[int] = []
        previous: BlockKey | None = None
        for position in range(max_blocks):
            self.extend_keys(keys, token_ids, cache_salt, position + 1)
            key = keys[position]
            key.parent = previous
            block_id = self._index.get(key.digest)
            if block_id is None:
                break
            indexed = self._keys[block_id]
            assert indexed is not None
            if not indexed.has_same_prefix(key):
                break
            # Going on with the indexed key, and hanging it under the one before it, lets the next
            # comparison end at its first step.
            indexed.parent = previous
            previous = keys[position] = indexed
            block_ids.append(block_id)
        return block_ids

    def allocate(self, num_blocks: int, shared: Sequence[int] = (), num_spare: int = 0) -> list[int] | None:
        """Takes ``num_blocks`` free blocks, and one more reference to each of ``shared``; all or nothing.

        None if the free blocks do not suffice, or fewer than ``num_spare`` would be left.
        """
        num_references = self._num_references
        num_taken = num_blocks + sum(1 for block_id in shared if not num_references[block_id])
        if self._num_free < num_taken + num_spare:
            return None
        self._num_free -= num_taken
        for block_id in shared:
            if not num_references[block_id]:
                self._stop_keeping(block_id)
            num_references[block_id] += 1
        block_ids = []
        for _ in range(num_blocks):
            block_id = self._next_free()
            num_references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def _next_free(self) -> int:
        """Takes the free block that is missed least."""
        if self._blank:
            return self._blank.popitem(last=False)[0]
        owners = self._kept
        blocks = max(owners.values(), key=len) if len(owners) > 1 else next(iter(owners.values()))
        block_id = next(iter(blocks))
        self._stop_keeping(block_id)
        self._forget(block_id)
        return block_id

    def _stop_keeping(self, block_id: int) -> None:
        owner = self._owners[block_id]
        blocks = self._kept[owner]
        del blocks[block_id]
        if not blocks:
            del self._kept[owner]

    def cache(self, block_id: int, key: BlockKey, owner: str | None = None) -> BlockKey:
        """Enters a held block, whose contents are complete, in the index, as one of ``owner``'s.

        If the same contents are indexed already, this block stays out. Returns the key that is indexed, for
        the key of the next block to follow.
        """
        holder = self._index.get(key.digest)
        if holder is None:
            self._index[key.digest] = block_id
            self._keys[block_id] = key
            self._owners[block_id] = owner
            return key
        indexed = self._keys[holder]
        assert indexed is not None
        return indexed if indexed.has_same_prefix(key) else key

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives back one reference to each of the blocks of a sequence, in the order of its block table."""
        for block_id in reversed(block_ids):
            self._num_references[block_id] -= 1
            if not self._num_references[block_id]:
                self._num_free += 1
                if self._keys[block_id] is None:
                    self._blank[block_id] = None
                    self._blank.move_to_end(block_id, last=False)
                else:
                    self._kept.setdefault(self._owners[block_id], OrderedDict())[block_id] = None

    def flush(self) -> int:
        """Empties the index: nothing that any block contains is found any more. Returns how many it had.

        Held blocks stay held, and what their holders fill from now on is indexed as ever. Behind a prefix
        that is not indexed it is found only when somebody has computed that prefix again.
        """
        num_indexed = len(self._index)
        self._index.clear()
        self._keys = [None] * self.num_blocks
        for blocks in self._kept.values():
            self._blank.update(blocks)
        self._kept.clear()
        return num_indexed

    def _forget(self, block_id: int) -> None:
        key = self._keys[block_id]
        if key is not None:
            del self._index[key.digest]
            self._keys[block_id] = None

    def check_invariants(self, held: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the pool agrees with all block tables and with itself."""
        references = Counter(block_id for block_ids in held for block_id in block_ids)
        for block_id in range(self.num_blocks):
            assert self._num_references[block_id] == references[block_id], f"references of block {block_id}"
            is_blank = block_id in self._blank
            is_kept = block_id in self._kept.get(self._owners[block_id], ())
            assert is_blank + is_kept == (references[block_id] == 0), f"freedom of block {block_id}"
            assert not is_blank or self._keys[block_id] is None, f"block {block_id} is not blank"
        num_free = len(self._blank) + sum(map(len, self._kept.values()))
        assert num_free == self._num_free, "the number of free blocks is wrong"
        assert num_free + len(references) == self.num_blocks, "a block is lost"
        assert all(self._kept.values()), "an owner of nothing"
        indexed = {key.digest: block_id for block_id, key in enumerate(self._keys) if key is not None}
        assert indexed == self._index, "the index does not match the contents"
        assert len(indexed) == sum(key is not None for key in self._keys), "contents indexed twice"
