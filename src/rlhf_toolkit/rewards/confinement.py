"""What a worker process sees of the machine: an environment of chosen variables and, where asked for, no network."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Sequence

_NAMES = (
    "PATH HOME USER LOGNAME SHELL TERM LANG LANGUAGE TZ TMPDIR TEMP TMP VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH "
    "HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HF_ENDPOINT HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE "
    "TRANSFORMERS_CACHE TORCH_HOME XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME NLTK_DATA TOKENIZERS_PARALLELISM "
    "DS_ACCELERATOR SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NO_PROXY no_proxy"
)
ALLOWED = frozenset(_NAMES.split())
"""Variables that workers get: where programs, files and caches are, languages, certificates."""
ALLOWED_BEGINNINGS = ("LC_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_")
"""And those of Python, of libraries of arithmetic and of devices."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
"""A name with one of these is that of a secret, whatever it begins with."""
WITH_USER = re.compile(r"://[^/\s]*@")
"""An address with a user and perhaps a password."""
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def environment_of_workers(named: Sequence[str] = ()) -> dict[str, str]:
    """The variables of ``ALLOWED`` and ``ALLOWED_BEGINNINGS`` without what looks like a secret, and those ``named``.

    What launchers tell a rank is not among them, so that a function which imports torch cannot join the run.
    """
    found = {}
    for name, value in os.environ.items():
        allowed = name in ALLOWED or (name.startswith(ALLOWED_BEGINNINGS) and not SECRET.search(name))
        if name in named or (allowed and not WITH_USER.search(value)):
            found[name] = value
    return found


def leave_network() -> None:
    """Move this process, which has one thread, and all that it will start into a network without any interface.

    A user namespace makes that possible without privileges; user and group stay what they are, so that files stay
    readable. The kernel holds it: nothing in there can go back. Sockets that are files in a folder, such as a
    container engine's, are no network and stay within reach. Raises OSError where the kernel refuses.
    """
    if sys.platform != "linux":
        raise OSError("only Linux can take the network from a process")
    user, group = os.geteuid(), os.getegid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel allows no user namespace here ({os.strerror(number)})")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
