"""Runs programs that nobody trusts: a file of its own, started by `python -I -S`, which imports the standard library alone.

Reads a job as JSON from its standard input and writes the results to its standard output. For each run a process M puts
itself into new namespaces (user, process ids, network, mounts, ipc) where the kernel lets it, its child P is process 1 in
them, and P's child becomes the program, behind resource limits, Landlock (files) and seccomp (sockets). What is left when the
program ends dies with P. This process watches: time, memory and number of all processes below M, and how much they say.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from contextlib import suppress

POLL_S = 0.05
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 36, 38
NEW_NAMESPACES = 0x20000 | 0x8000000 | 0x20000000 | 0x40000000  # mounts, ipc, process ids, network
NEW_USER = 0x10000000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ, READ_FILE_AND_RUN, USE_DEVICE = 0b1101, 0b101, 0b110
NO_DEVICES = ~(1 << 6 | 1 << 11)
"""Rights of Landlock: run, read files and folders; read and write; all but to make device files."""
ARCHITECTURES = {
    # AUDIT_ARCH; socket, ptrace, mount, unshare, setns, bpf, keyctl, add_key, memfd_create, shmget, semget, msgget, setsockopt
    # (buffers of sockets belong to no process either: left as they are, 50 pairs hold some MiB); kill, tkill, tgkill; clone.
    "x86_64": (0xC000003E, (41, 101, 165, 272, 308, 321, 250, 248, 319, 29, 64, 68, 54), (62, 200, 234), 56),
    "aarch64": (0xC00000B7, (198, 117, 40, 97, 268, 280, 219, 217, 279, 194, 190, 186, 208), (129, 130, 131), 220),
}
# The same everywhere: memfd_secret, io_uring_setup, and the calls of the newer way to mount.
REFUSED_EVERYWHERE = (447, 425, 428, 429, 430, 431, 432, 433, 442)
PIDFD_SEND_SIGNAL, CLONE3 = 424, 435
ANY_NAMESPACE = 0x7E020000
"""Flags of clone."""


def main() -> None:
    """Carry out one job; at its end nothing that it has started is left."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    job = json.load(sys.stdin)
    missing = _missing()
    if missing and not job["allow_unconfined"]:
        json.dump({"missing": missing, "runs": []}, sys.stdout)
        return
    runs = []
    for text in job["inputs"]:
        runs.append(_run(job, text))
        if job["stops_at_failure"] and runs[-1]["exit_code"] != 0:
            break
    json.dump({"missing": missing, "runs": runs}, sys.stdout)


def _missing() -> list[str]:
    """What this kernel lacks of that without which files or the network are open."""
    has_landlock = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1) >= 1
    has_seccomp = platform.machine() in ARCHITECTURES and LIBC.prctl(21, 0, 0, 0, 0) >= 0
    return [name for name, has in (("Landlock", has_landlock), ("seccomp", has_seccomp)) if not has]


def _run(job: dict, text: str) -> dict:  # type: ignore[type-arg]
    """One run of the program with `text` as its standard input."""
    said_out, said_in = os.pipe()
    wrong_out, wrong_in = os.pipe()
    given = os.memfd_create("input")
    os.write(given, text.encode())
    os.lseek(given, 0, os.SEEK_SET)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _confined(job, given, said_in, wrong_in)
    for descriptor in (said_in, wrong_in, given):
        os.close(descriptor)
    texts = {said_out: b"", wrong_out: b""}
    reason, status = _watch(job, pid, texts, started)
    _end_all(pid)
    for descriptor in texts:
        os.close(descriptor)
    return {
        "exit_code": os.waitstatus_to_exitcode(status) if reason is None else -int(signal.SIGKILL),
        "reason": reason,
        "stdout": texts[said_out].decode(errors="replace"),
        "stderr": texts[wrong_out][-2000:].decode(errors="replace"),
        "seconds": time.monotonic() - started,
    }


def _watch(job: dict, pid: int, texts: dict[int, bytes], started: float) -> tuple[str | None, int]:  # type: ignore[type-arg]
    """Wait for the end, or for a limit: which one, and the wait status."""
    open_ends = set(texts)
    while True:
        for descriptor in select.select(list(open_ends), [], [], POLL_S)[0]:
            data = os.read(descriptor, 65536)
            texts[descriptor] += data
            if not data:
                open_ends.discard(descriptor)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _rest(texts, open_ends, job["output_bytes"])
            return _limit_of(status), status
        if time.monotonic() - started > job["wall_s"]:
            return "time", 0
        if sum(map(len, texts.values())) > job["output_bytes"]:
            return "output", 0
        below, num_threads = _descendants(pid)
        if len(below) > job["max_processes"] + 2 or num_threads > job["max_threads"] + 2:
            return "processes", 0
        if sum(_resident_bytes(other) for other in below) > job["memory_bytes"]:
            return "memory", 0
        if not open_ends:
            time.sleep(POLL_S)


def _rest(texts: dict[int, bytes], open_ends: set[int], most: int) -> None:
    """What is still in the pipes."""
    while ready := select.select(list(open_ends), [], [], 0)[0] if open_ends else []:
        for descriptor in ready:
            data = os.read(descriptor, 65536)
            texts[descriptor] += data
            if not data or sum(map(len, texts.values())) > most:
                open_ends.discard(descriptor)


def _limit_of(status: int) -> str | None:
    """The limit of the kernel's that ended the program, as its process 1 has passed it on."""
    return "time" if os.waitstatus_to_exitcode(status) == 128 + signal.SIGXCPU else None


def _descendants(pid: int) -> tuple[list[int], int]:
    """The process and all below it, and how many threads they have."""
    found, waiting, num_threads = list[int](), [pid], 0
    while waiting and len(found) < 10000:
        current = waiting.pop()
        found.append(current)
        with suppress(OSError, ValueError):
            threads = os.listdir(f"/proc/{current}/task")
            num_threads += len(threads)
            for thread in threads:
                with open(f"/proc/{current}/task/{thread}/children") as file:
                    waiting += map(int, file.read().split())
    return found, num_threads


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def _end_all(pid: int) -> None:
    """Kill M, with it P and so all of their namespace; without namespaces orphans become children of this process."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while True:
        for other in _descendants(os.getpid())[0][1:]:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(other, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _confined(job: dict, given: int, said: int, wrong: int) -> None:  # type: ignore[type-arg]
    """M, P and the program. Does not return."""
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        has_namespaces = _enter_namespaces(job["folder"])
        with open(os.path.join(job["folder"], job["file"]), "w", encoding="utf-8") as file:
            file.write(job["program"])
        init = os.fork()
        if init:
            os._exit(_code_of(os.waitpid(init, 0)[1]))
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        program = os.fork()
        if program:  # process 1: reap what comes, end with the program
            while True:
                ended, status = os.wait()
                if ended == program:
                    os._exit(_code_of(status))
        for source, target in ((given, 0), (said, 1), (wrong, 2)):
            os.dup2(source, target)
        os.closerange(3, 1024)
        os.chdir(job["folder"])
        _limit(job)
        _restrict(job, has_namespaces=has_namespaces)
        os.execve(job["command"][0], job["command"], job["environment"])
    except BaseException as error:
        os.write(wrong, f"the sandbox could not start the program: {error!r}".encode())
    os._exit(125)


def _code_of(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _enter_namespaces(folder: str) -> bool:
    """Whether the next child is process 1 of namespaces of its own. The folder is then in memory, of a limited size."""
    user, group = os.geteuid(), os.getegid()
    if LIBC.unshare(NEW_USER | NEW_NAMESPACES) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    elif LIBC.unshare(NEW_NAMESPACES) != 0:
        return False
    LIBC.mount(None, b"/", None, 0x4000 | 0x40000, None)  # what is mounted below stays in here
    LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", 0x2 | 0x4, b"size=64m,nr_inodes=4096,mode=700")
    return True


def _limit(job: dict) -> None:  # type: ignore[type-arg]
    cpu_s = max(1, int(job["cpu_s"]))
    limits = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_AS: (job["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (job["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (128, 128),
        resource.RLIMIT_NPROC: (job["max_processes"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, limit)
    os.nice(19)


def _restrict(job: dict, *, has_namespaces: bool) -> None:  # type: ignore[type-arg]
    """Give up for good what the program must not do."""
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    _landlock(job["folder"], job["readable"])
    _seccomp(may_signal=has_namespaces)


def _landlock(folder: str, readable: list[str]) -> None:
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = LIBC.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "Landlock")
    devices = dict.fromkeys(("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"), USE_DEVICE)
    for path, rights in {folder: handled & NO_DEVICES, **dict.fromkeys(readable, READ), **devices}.items():
        if not os.path.exists(path):
            continue
        rights = rights if os.path.isdir(path) or path in devices else READ_FILE_AND_RUN
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if LIBC.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights & handled, place), 0) != 0:
            raise OSError(ctypes.get_errno(), f"Landlock: {path}")
        os.close(place)
    if LIBC.syscall(LANDLOCK_RESTRICT, rules, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock")
    os.close(rules)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(*, may_signal: bool) -> None:
    """Sockets, tracing, mounts, memory that belongs to no process, and what leads around them fail with EPERM; so do signals
    where no namespace holds them, and namespaces of the program's own."""
    if platform.machine() not in ARCHITECTURES:
        return
    architecture, refused, signals, clone = ARCHITECTURES[platform.machine()]
    numbers = [*refused, *REFUSED_EVERYWHERE, *(() if may_signal else (*signals, PIDFD_SEND_SIGNAL))]
    load, equal, at_least, any_of, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    to_refusal = len(numbers) + 5  # steps from the first comparison to the answer EPERM
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(at_least, to_refusal, 0, 0x40000000)]  # x32, another numbering on the same architecture
    steps += [(equal, to_refusal - 1 - place, 0, number) for place, number in enumerate(numbers)]
    # What clone3 is asked for, a filter cannot read: ENOSYS has libraries call clone, whose flags are its first argument.
    steps += [(equal, 5, 0, CLONE3), (equal, 0, 2, clone), (load, 0, 0, 16), (any_of, 1, 0, ANY_NAMESPACE)]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001), (answer, 0, 0, 0x00050026)]
    program = _Program(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    if LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    main()
