"""Source distributions of vLLM from the Python package index."""

import hashlib
import re
import tarfile
import urllib.request
from pathlib import Path

INDEX = "https://pypi.org/simple/vllm/"
FOLDER = Path("build/vllm")
"""Downloads are kept here."""


def unpacked(release: str, part: str, archive: Path | None = None) -> Path:
    """Return the folder of an unpacked release.

    Args:
        release: version of vLLM, for example ``0.32.0``.
        part: the folder of the distribution that is needed, ``vllm`` or ``tests``.
        archive: the source distribution; None to download it, once.

    Raises:
        SystemExit: the index has no such release, or the download is damaged.
    """
    folder = (FOLDER / release).resolve()
    if (folder / part).exists():
        return folder
    if archive is None:
        archive = FOLDER / f"vllm-{release}.tar.gz"
        if not archive.exists():
            print(f"downloading vLLM {release} …", flush=True)
            _download(release, archive)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name.startswith(f"{part}/"):
                tar.extract(member, folder, filter="data")
    return folder


def _download(release: str, target: Path) -> None:
    page = urllib.request.urlopen(INDEX).read().decode()
    found = re.search(rf'href="([^"#]*/vllm-{re.escape(release)}\.tar\.gz)#sha256=(\w+)"', page)
    if found is None:
        raise SystemExit(f"{INDEX} has no source distribution of vLLM {release}.")
    data = urllib.request.urlopen(found[1]).read()
    if hashlib.sha256(data).hexdigest() != found[2]:
        raise SystemExit(f"The hash of {found[1]} is not that of the index.")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
