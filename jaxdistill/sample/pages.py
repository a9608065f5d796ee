"""Which page of the cache belongs to whom: reference counts, and prompt pages that requests share."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class Pool:
    """The pages of one device's cache, by number.

    A page that holds part of a prompt is published under what it holds: the tokens from the prompt's start to the
    page's end, which decide its keys and values. It stays findable when nobody holds it any more, until its room is
    needed; then the page that has been idle longest goes first.
    """

    def __init__(self, pages: int, page_tokens: int):
        self.pages, self.page_tokens = pages, page_tokens
        self._free = list(range(pages))[::-1]
        self._references = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # published, held by nobody

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """Pages of the caller's own, or None where there are not as many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._free.append(page)
            page = self._free.pop()
            self._references[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one hold on each page."""
        for page in pages:
            assert self._references[page] > 0
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Takes hold of the published pages under the first of these keys, as many in a row as there are."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._references[page] += 1
            self._idle.pop(page, None)
            found.append(page)
        return found

    def publish(self, key: bytes, page: int) -> None:
        """Makes a page findable. Whatever reads it must be dispatched after what wrote it.

        Two requests that read the same prompt at once both hold pages for it; the first to finish is found.
        """
        assert self._references[page] > 0
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key


def prompt_keys(prompt: Sequence[int], page_tokens: int) -> list[bytes]:
    """Names of the whole pages of a prompt: digests of all tokens up to each one's end."""
    digest, keys = hashlib.sha256(), []
    tokens = np.asarray(prompt, np.int32)
    for end in range(page_tokens, len(tokens) + 1, page_tokens):
        digest.update(tokens[end - page_tokens : end].tobytes())
        keys.append(digest.digest())
    return keys
