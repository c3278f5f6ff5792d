"""Links to stored images, in the order of the links: what preparing shards and training from the stream share."""

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from align_train.corpus.fetch.client import Client, Limits, Permissions
from align_train.corpus.images import ImageSettings, StoredImage, Unusable, store_image

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Fetched(Generic[K]):
    """What became of one link: an image, or the reason why there is none.

    Attributes:
        key: what the caller calls the row.
        image: the image as it is stored; None where there is none.
        reason: empty, or a short name to count by, such as `http_404`.
        detail: one line for people.
    """

    key: K
    image: StoredImage | None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Fetcher:
    """Downloads, verifies and resizes images.

    Attributes:
        limits: time, size and number of transfers.
        permissions: what may be contacted.
        images: how images are stored.
    """

    limits: Limits = field(default_factory=Limits)
    permissions: Permissions = field(default_factory=Permissions)
    images: ImageSettings = field(default_factory=ImageSettings)

    def fetch(self, rows: Iterable[tuple[K, str]]) -> Generator[Fetched[K], None, None]:
        """One result for each (key, url), in their order; later ones are downloaded while the first is awaited.

        `rows` is read ahead, in another thread, no further than the limits allow.
        """
        waiting: dict[int, Fetched[K]] = {}
        wanted = 0
        numbered = (((number, key, url), url) for number, (key, url) in enumerate(rows))
        with closing(Client(self.limits, self.permissions).downloads(numbered)) as downloads:
            for (number, key, url), download in downloads:
                if download.reason:
                    waiting[number] = Fetched(key, None, download.reason, download.detail)
                else:
                    waiting[number] = self._stored(key, download.content, url)
                while wanted in waiting:
                    yield waiting.pop(wanted)
                    wanted += 1

    def _stored(self, key: K, content: bytes, url: str) -> Fetched[K]:
        try:
            return Fetched(key, store_image(content, self.images, url))
        except Unusable as problem:
            return Fetched(key, None, problem.reason, str(problem))
