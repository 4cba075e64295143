"""The address by which the ranks of a run reach this process."""

from __future__ import annotations

import os
import socket
import sys

ONE_MACHINE = "HYBRIDFLOW_ONE_MACHINE"
"""In the environment of ranks whose cluster is one machine: what they open is then open to it alone."""
LOOPBACK = "127.0.0.1"


def environment_of_one_machine() -> dict[str, str]:
    """What has ranks of one machine, and the libraries that they use, meet on its loopback interface; what is set stays."""
    interface = "lo" if sys.platform == "linux" else "lo0"
    wanted = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "VLLM_HOST_IP": LOOPBACK}
    return {ONE_MACHINE: "1"} | {name: os.environ.get(name, value) for name, value in wanted.items()}


def own_host() -> str:
    """Loopback where the cluster is one machine. Else the address by which others reach this one; nothing is sent to find it:
    connecting UDP only picks an interface."""
    if os.environ.get(ONE_MACHINE):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probing:
        try:
            probing.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737: routed like any other address
        except OSError:
            return LOOPBACK
        return str(probing.getsockname()[0])
