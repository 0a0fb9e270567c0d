"""Shards on a plain web server: http:// and https:// for streaming, which has no downloader for them."""

import importlib
import os
from typing import Any

from bitlm_dist.data.streaming_import import streaming


def register() -> None:
    """Make streaming take http:// and https:// URLs as a remote."""
    download = streaming("storage.download")
    base: Any = download.CloudDownloader
    if "http" in download.DOWNLOADER_MAPPINGS:
        return

    class HttpDownloader(base):  # type: ignore[misc]
        """Fetches files through fsspec."""

        @staticmethod
        def _client_identifier() -> str:
            return "http"

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            aiohttp: Any = importlib.import_module("aiohttp")
            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            files = importlib.import_module("fsspec").filesystem("http", client_kwargs={"timeout": limits})
            partial = f"{local}.tmp"
            files.get_file(remote, partial)
            os.rename(partial, local)

        def clean_up(self) -> None:
            pass  # fsspec keeps the session for the next file

    class HttpsDownloader(HttpDownloader):
        """The same with encryption."""

        @staticmethod
        def _client_identifier() -> str:
            return "https"

    download.DOWNLOADER_MAPPINGS.update(http=HttpDownloader, https=HttpsDownloader)
