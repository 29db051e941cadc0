"""The two public corpora that have a source of their own: where they are, and how they get here.

    shakespeare   public-domain text, collected for char-rnn (that repository: MIT)
    enwik8        first 10**8 bytes of the English Wikipedia dump of 2006-03-03
                  (text: GFDL 1.2, also CC BY-SA 3.0); http://mattmahoney.net/dc/textdata.html

Size and sha256 of the content are checked on every load, so that a number named after a corpus
was measured on it.
"""

import fcntl
import hashlib
import http.client
import io
import logging
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_router.errors import DataError
from moe_router.training.data.files import Text, drain, expand, read_content, replacing, unpacked

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublicFile:
    """A corpus anybody can fetch.

    Attributes:
        source: its name in data.source, and of its file in data.cache.
        url: of the file, or of a zip that holds it alone.
        size: bytes of the content.
        sha256: of the content.
        train, val: how many bytes of its start are for training; how many next are held out.
    """

    source: str
    url: str
    size: int
    sha256: str
    train: int
    val: int


SHAKESPEARE = PublicFile(
    source="shakespeare",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    train=1_003_854,  # the usual 90 %
    val=111_540,
)
ENWIK8 = PublicFile(
    source="enwik8",
    url="http://mattmahoney.net/dc/enwik8.zip",
    size=100_000_000,
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    train=90_000_000,  # the usual 90/5/5; the last 5 M are the test part, not read here
    val=5_000_000,
)


def load_public(file: PublicFile, path: str | None, cache: str, timeout: float = 30.0) -> Text:
    """The checked content of a public corpus.

    Args:
        path: a local copy, plain or .xz, .gz, .zip; None takes the cache, or downloads into it.
        cache: folder of downloads.
        timeout: seconds without an answer after which the download is given up.

    Raises:
        DataError: it is missing, cannot be downloaded, or is not this corpus.
    """
    if path is not None:
        local = _one(path)
        fix = f"data.source=text reads other files; the original is at {file.url}"
    else:
        local = Path(cache).expanduser() / file.source
        fix = "delete it to download it again"
        with _locked(local):
            if not local.is_file():
                _download(file, local, timeout)
    content = read_content(local, file.size)
    _check(file, content, str(local), fix)
    return content


def _one(path: str) -> Path:
    found = expand(path, (".txt", ""))
    if len(found) != 1:
        raise DataError(f"data.path={path}: {len(found)} files, want one")
    return found[0]


def _check(file: PublicFile, content: Text, where: str, fix: str) -> None:
    if len(content) != file.size:
        got = f"more than {file.size:,}" if len(content) > file.size else f"{len(content):,}"
        raise DataError(f"{where}: {got} bytes, want {file.source}'s {file.size:,}; {fix}")
    digest = hashlib.sha256(content.data).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{where}: sha256 {digest[:12]}…, want {file.source}'s {file.sha256[:12]}…; {fix}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One download at a time: the ranks of a machine start together and share the cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("wb")
    except OSError as error:
        if path.is_file():  # a cache somebody else filled, read-only to us
            yield
            return
        raise DataError(
            f"data.cache={path.parent}: cannot be written ({error.strerror}); "
            "set data.cache to a folder of yours, or data.path to the file"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(file: PublicFile, target: Path, timeout: float) -> None:
    _log.info("downloading %s to %s", file.url, target)
    by_hand = "download it by hand and set data.path"
    try:
        with urllib.request.urlopen(file.url, timeout=timeout) as response:
            body = response.read(file.size + 1)  # a zip is smaller than what it holds
        with unpacked(io.BytesIO(body)) as stream:
            content = drain(stream, file.size)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"data.source={file.source}: {file.url} answers {error.code} {error.reason}; {by_hand}"
        ) from error
    except zipfile.BadZipFile as error:
        raise DataError(
            f"data.source={file.source}: what {file.url} sent is no whole zip ({error}); {by_hand}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"data.source={file.source}: cannot download {file.url} ({reason}); {by_hand}"
        ) from error
    _check(file, content, file.url, by_hand)
    with replacing(target) as out:
        out.write(content.data)
