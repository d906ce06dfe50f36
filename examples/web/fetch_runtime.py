"""Fetch ONNX Runtime Web from the npm registry into examples/web/runtime, where the repository has it already.

    python examples/web/fetch_runtime.py

The repository carries these files so that the page works from a clone, offline and behind firewalls. This script says
where they come from, and brings another version: change VERSION and INTEGRITY (`npm view onnxruntime-web@VERSION
dist.integrity`), and take LICENSE and ThirdPartyNotices.txt from PyPI's onnxruntime of that version. It needs Python
only. The environment variable npm_config_registry names another registry, as for npm.
"""

import base64
import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # the JavaScript API, and the runtime itself
RUNTIME = Path(__file__).with_name("runtime")


def main() -> int:
    """Fetch, check and write; returns the exit code: 0, or 1 when the package is not to be had or not the one."""
    named = os.environ.get("npm_config_registry")  # noqa: SIM112 - npm's own spelling
    registry = (named or "https://registry.npmjs.org").rstrip("/")
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            package = answer.read()
    except OSError as error:
        print(f"error: cannot fetch {address}: {error}", file=sys.stderr)
        return 1
    found = "sha512-" + base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != INTEGRITY:
        print(f"error: {address} is not the package that this script knows: {found}", file=sys.stderr)
        return 1
    RUNTIME.mkdir(exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        for name in FILES:
            (RUNTIME / name).write_bytes(files.extractfile(f"package/dist/{name}").read())
    print(f"onnxruntime-web {VERSION}: {RUNTIME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
