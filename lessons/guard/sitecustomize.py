"""What a lesson must not lean on, refused in its kernel and in every Python that the kernel starts.

A reader may have the package and nothing else: no network, no extras, no clone of the repository around the notebook.
Python imports this module by itself, since the build puts its folder on PYTHONPATH.
"""

import importlib.machinery
import importlib.util
import os
import re
import sys
import tomllib

GUARD = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(os.path.dirname(GUARD))
# What a lesson may open in there; whoever has a lesson has the style of its figures or matplotlib's own.
READABLE = [os.path.join(ROOT, name) for name in ("nanogptx", ".venv", os.path.join("lessons", "matplotlibrc"))]
READABLE += [os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)]
MODULES = {"protobuf": "google", "prometheus-client": "prometheus_client", "myst-nb": "myst_nb"}
MODULES |= {"pytest-timeout": "pytest_timeout", "pytest-xdist": "xdist", "sphinx-book-theme": "sphinx_book_theme"}
OTHERS = {"tokenizers", "datasets", "huggingface_hub", "accelerate", "tiktoken", "requests", "httpx", "aiohttp"}
CONNECTS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def extras():
    """The modules of pyproject.toml's extras: what a reader who installed the book may not have."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    names = {re.match(r"[\w.-]+", line)[0] for lines in project["optional-dependencies"].values() for line in lines}
    return {MODULES.get(name, name) for name in names}


REFUSED = extras() | OTHERS


def inside(path, folder):
    return path == folder or path.startswith(folder + os.sep)


def loopback(host):
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    return host in (None, "", "localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int):
            return
        path = os.path.realpath(os.fsdecode(path))
        if not inside(path, ROOT):
            return
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and f"{os.sep}__pycache__{os.sep}" not in path or not any(inside(path, free) for free in READABLE):
            name = os.path.relpath(path, ROOT)
            raise PermissionError(
                f"a lesson may not {'write' if writes else 'read'} {name}: its readers have the package only"
            )
    elif event == "import":
        name = arguments[0].partition(".")[0]
        if name in REFUSED:
            raise ModuleNotFoundError(
                f"a lesson may not import {name}: it is no core dependency of the book", name=name
            )
    elif event in CONNECTS:
        address = arguments[1]
        if isinstance(address, tuple) and not loopback(address[0]):
            raise ConnectionRefusedError(f"a lesson may not reach {address[0]}: it works without a network")
    elif event in LOOKUPS and not loopback(arguments[0]):
        raise ConnectionRefusedError(f"a lesson may not look up {arguments[0]}: it works without a network")


def load_the_next_one():
    """There may be another sitecustomize, say a distribution's, which this one hides."""
    elsewhere = [path for path in sys.path if os.path.realpath(path) != GUARD]
    if spec := importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


load_the_next_one()
sys.addaudithook(watch)
