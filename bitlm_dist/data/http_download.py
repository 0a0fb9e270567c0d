"""HTTP(S) downloader for mosaicml-streaming, which ships none for plain web servers."""

import importlib
import os
from typing import Any

from typing_extensions import override

from bitlm_dist.data.streaming_import import import_streaming


def register() -> None:
    """Register http:// and https:// as remotes of mosaicml-streaming. A no-op if they are known."""
    download = import_streaming("storage.download")
    base: Any = download.CloudDownloader
    if "http" in download.DOWNLOADER_MAPPINGS:
        return

    # Defined here, because the base class exists only once streaming has been imported.
    class HttpDownloader(base):  # type: ignore[misc]
        """Downloads files through fsspec."""

        @staticmethod
        @override
        def _client_identifier() -> str:
            return "http"

        @override
        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            aiohttp: Any = importlib.import_module("aiohttp")

            # No limit on the total: a large shard may take long, as long as data keep coming.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            files = importlib.import_module("fsspec").filesystem(
                "http", client_kwargs={"timeout": limits}
            )

            # Downloaded under another name, so that the shard is either complete or absent.
            partial = f"{local}.tmp"
            files.get_file(remote, partial)
            os.rename(partial, local)

        @override
        def clean_up(self) -> None:
            # Nothing to close: fsspec keeps the session for the next file.
            pass

    class HttpsDownloader(HttpDownloader):
        """Downloads files over TLS."""

        @staticmethod
        @override
        def _client_identifier() -> str:
            return "https"

    download.DOWNLOADER_MAPPINGS.update(http=HttpDownloader, https=HttpsDownloader)
