"""Charges that an ingress makes to the account of a request's media, as early as it is known."""

from collections.abc import Mapping, Sequence

from deployments.stages import OpenFile, Pixels
from engine.media.ledger import Account
from engine.media.source import MediaSource
from engine.prompt import KeptFiles


class MediaCharges:
    """Charges the media of one prompt, each amount once, however often they are prepared.

    Args:
        account: of the request.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._pages_done = self._prepared_done = False

    def sources(self, sources: Sequence[MediaSource], files: Mapping[int, KeptFiles]) -> None:
        """Charge the items, the frames of lists, and the bytes that came with the request or are kept for it.

        Args:
            files: kept files, by the index of the source that names them.

        Raises:
            MediaTooLarge, Overloaded: naming the part that is one too many.
        """
        charge = self._account.charge
        for source in sources:
            charge("items", 1, source.where)
            charge("frames", len(source.frames), source.where)
            size = files[source.index].size if source.index in files else _inline_bytes(source)
            charge("bytes", size, source.where)

    def pages(self, opened: Sequence[OpenFile]) -> None:
        """Charge the pages of opened files before they are rendered; errors as :meth:`sources`."""
        if self._pages_done:
            return
        for file in opened:
            pages = file.pages.sources
            for place, source in enumerate(pages):
                # The first page is the item that the file was charged as.
                self._account.charge("items", int(place > 0), source.where)
                if source.page is not None:
                    width, height = source.page.size
                    self._account.charge("pixels", width * height, source.where)
        self._pages_done = True

    def prepared(self, sources: Sequence[MediaSource], pixels: Sequence[Sequence[Pixels]]) -> None:
        """Charge the tokens, the pixels, and the frames of video files; errors as :meth:`sources`.

        Args:
            pixels: the images of each source.
        """
        if self._prepared_done:
            return
        charge = self._account.charge
        for source, images in zip(sources, pixels, strict=True):
            for each in images:
                charge("tokens", each.item.num_tokens, source.where)
                if source.rows is not None or source.pages is not None:
                    continue
                width, height = each.item.size
                charge("pixels", width * height * each.frames, source.where)
                if source.is_video_file:
                    charge("frames", each.frames, source.where)
        self._prepared_done = True


def _inline_bytes(source: MediaSource) -> int:
    """Bytes of the files in the request's body, before they are decoded."""
    texts = [frame.url for frame in (source.frames or (source,)) if frame.url is not None]
    inline = [text for text in texts if text[:5].lower() == "data:"]
    if source.rows is not None:
        inline.append(source.rows.payload)
    return sum(len(text) // 4 * 3 for text in inline)
