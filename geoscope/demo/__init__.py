"""The small real run that ships with the package, and its story."""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

from geoscope.errors import OptionError

__all__ = ["unpack"]


def unpack(folder: Path) -> bool:
    """Unpacks the run into `folder`; False when an equal copy is there already.

    Raises OptionError when the folder holds anything else. It appears whole or not at all.
    """
    with as_file(files(__name__) / "run.zip") as archive, zipfile.ZipFile(archive) as run:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            run.extractall(scratch)
            if folder.exists() and any(folder.iterdir()):
                if _equal(scratch, folder):
                    return False
                raise OptionError(
                    f"{folder} holds something else; name another folder: geoscope demo FOLDER"
                )
            if folder.exists():
                folder.rmdir()
            scratch.chmod(0o755)
            os.replace(scratch, folder)  # noqa: PTH105 - replaces on every platform
            return True
        except NotADirectoryError:
            raise OptionError(f"{folder} is a file; name another folder") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _equal(unpacked: Path, folder: Path) -> bool:
    """Whether every file of the run stands in `folder` unchanged; further files do not matter."""
    names = [path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()]
    return all(
        (folder / name).is_file() and filecmp.cmp(unpacked / name, folder / name, shallow=False)
        for name in names
    )
