"""Files of rows to read, on disk or at a URL of any file system that fsspec knows: gs://, s3://, hf://, https://.

`Path("gs://b/x")` keeps one slash of the two and all else; it is taken for the URL everywhere.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec

from jaxdistill.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")
_BUFFER_BYTES = 2**20  # of remote lines: fsspec's own reading of a line is slow
_VERSIONS = ("ETag", "Content-MD5", "Digest", "Last-Modified")  # what a web server may say of a file beside its size


def is_remote(path: Path) -> bool:
    """Whether a path is a URL."""
    return _URL.fullmatch(str(path)) is not None


def name(path: Path) -> str:
    """A path as its user wrote it: of a URL both slashes."""
    if (found := _URL.fullmatch(str(path))) is None:
        return str(path)
    scheme, rest = found.groups()
    return f"{scheme}://{'/' * (scheme == 'file')}{rest}"


def absolute(path: Path) -> str:
    """The one name of a file, from anywhere on this machine."""
    return name(path) if is_remote(path) else str(path.resolve())


def unsigned(path: Path) -> Path:
    """A path without what a signed URL says after it: its name says what the file is."""
    return Path(str(path).partition("?")[0]) if is_remote(path) else path


def suffix(path: Path) -> str:
    """What a file's name says of its format."""
    return unsigned(path).suffix


def wrong(path: Path) -> str | None:
    """Why there is no file to read: there is none, or it is a folder; None where there is one.

    Raises:
      UserError: a URL's file system is unknown, lacks its package or does not answer.
    """
    if not is_remote(path):
        return None if path.is_file() else "is a folder" if path.is_dir() else "no such file"
    system, where = _system(path)
    try:
        return "is a folder" if system.info(where)["type"] == "directory" else None
    except FileNotFoundError as error:  # which fsspec also makes of a web server that does not answer
        return f"no such file ({error.__cause__})" if error.__cause__ else "no such file"
    except Exception as error:  # each file system has errors of its own: no credentials, no such host, refused
        raise UserError(f"{name(path)} cannot be read ({type(error).__name__}: {error})") from error


def check(path: Path, expected: str = "a JSON Lines file") -> None:
    """Raises UserError where there is no file to read."""
    if found := wrong(path):
        raise UserError(f"{name(path)}: {found}; expected {expected}")


def version(path: Path) -> dict[str, Any] | None:
    """What tells a file from what it was before or will be, without reading it; None where nothing does.

    Of a file on disk its size and time; of a remote one all that its file system says of it: time, ETag, generation,
    commit. A web server may say nothing but a size.
    """
    if not is_remote(path):
        seen = path.stat()
        return {"path": absolute(path), "bytes": seen.st_size, "modified_ns": seen.st_mtime_ns}
    system, where = _system(path)
    info = system.info(where)
    if name(path).startswith("http"):
        info = {key: info[key] for key in ("size", *_VERSIONS) if key in info}
        if not info.keys() & set(_VERSIONS):
            return None
    return {"path": absolute(path), "info": {key: str(value) for key, value in sorted(info.items())}}


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file to read bytes of it from anywhere."""
    if not is_remote(path):
        return path.open("rb")
    system, where = _system(path)
    return io.BufferedReader(cast(io.RawIOBase, system.open(where, "rb")), _BUFFER_BYTES)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """A file that is on disk: itself, or of a remote one a copy (under $TMPDIR) that is gone after the block."""
    if not is_remote(path):
        yield path
        return
    system, where = _system(path)
    with tempfile.TemporaryDirectory(prefix="jaxdistill-") as folder:
        copy = Path(folder) / unsigned(path).name
        system.get_file(where, str(copy))
        yield copy


def _system(path: Path) -> tuple[Any, str]:
    """The file system of a URL, and the file's name in it."""
    try:
        return fsspec.url_to_fs(name(path))
    except ImportError as error:
        raise UserError(
            f"{name(path)} needs a package that is not installed ({error}); pip install 'jaxdistill[remote]'"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{name(path)}: {error}; expected a URL that fsspec knows, such as gs://, s3:// or hf://"
        ) from None
