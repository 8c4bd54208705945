"""The child of `run.py`: shuts itself in, then runs the program that stands on its standard input.

    limits (setrlimit) -> files (Landlock) -> system calls (seccomp) -> exec

A script of its own, with the standard library alone, so that nothing else is loaded when the doors close. Numbers come
from the kernel's headers: linux/landlock.h, linux/seccomp.h, linux/bpf_common.h, asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 1, 22, 38, 4
SIGKILL = 9

# asm/unistd.h. What is refused is what reaches another process, the network, or files by other ways than Landlock sees.
# Numbers from 424 on are the same on both machines.
_COMMON = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "process_mrelease": 448, "fchmodat2": 452,
    "setxattrat": 463, "removexattrat": 466,
}  # fmt: skip
_X86_64 = {
    "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50,
    "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "shmget": 29, "shmat": 30, "shmctl": 31,
    "semget": 64, "semop": 65, "semctl": 66, "msgget": 68, "msgsnd": 69, "msgctl": 71, "truncate": 76, "chmod": 90,
    "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101, "setuid": 105, "setgid": 106,
    "setpgid": 109, "setsid": 112, "setreuid": 113, "setregid": 114, "setgroups": 116, "setresuid": 117,
    "setresgid": 119, "rt_sigqueueinfo": 129, "utime": 132, "mknod": 133, "personality": 135, "setpriority": 141,
    "sched_setparam": 142, "sched_setscheduler": 144, "pivot_root": 155, "adjtimex": 159, "setrlimit": 160,
    "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169,
    "sethostname": 170, "init_module": 175, "delete_module": 176, "quotactl": 179, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "tkill": 200,
    "sched_setaffinity": 203, "utimes": 235, "mq_open": 240, "kexec_load": 246, "add_key": 248, "request_key": 249,
    "keyctl": 250, "ioprio_set": 251, "migrate_pages": 256, "mknodat": 259, "fchownat": 260, "futimesat": 261,
    "fchmodat": 268, "unshare": 272, "move_pages": 279, "utimensat": 280, "accept4": 288, "rt_tgsigqueueinfo": 297,
    "perf_event_open": 298, "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "sched_setattr": 314,
    "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = {
    "socket": 198, "socketpair": 199, "bind": 200, "listen": 201, "accept": 202, "connect": 203, "sendto": 206,
    "sendmsg": 211, "execve": 221, "kill": 129, "tkill": 130, "shmget": 194, "shmctl": 195, "shmat": 196, "semget": 190,
    "semctl": 191, "semop": 193, "msgget": 186, "msgctl": 187, "msgsnd": 189, "truncate": 45, "fchmod": 52,
    "fchmodat": 53, "fchownat": 54, "fchown": 55, "ptrace": 117, "setuid": 146, "setgid": 144, "setreuid": 145,
    "setregid": 143, "setresuid": 147, "setresgid": 149, "setpgid": 154, "setsid": 157, "setgroups": 159,
    "rt_sigqueueinfo": 138, "mknodat": 33, "personality": 92, "setpriority": 140, "sched_setparam": 118,
    "sched_setscheduler": 119, "pivot_root": 41, "adjtimex": 171, "setrlimit": 164, "chroot": 51, "acct": 89,
    "settimeofday": 170, "mount": 40, "umount2": 39, "swapon": 224, "reboot": 142, "sethostname": 161,
    "init_module": 105, "delete_module": 106, "quotactl": 60, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7,
    "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "sched_setaffinity": 122, "mq_open": 180,
    "kexec_load": 104, "add_key": 217, "request_key": 218, "keyctl": 219, "ioprio_set": 30, "migrate_pages": 238,
    "unshare": 97, "move_pages": 239, "utimensat": 88, "accept4": 242, "rt_tgsigqueueinfo": 240,
    "perf_event_open": 241, "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268,
    "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273, "sched_setattr": 274,
    "kexec_file_load": 294, "bpf": 280, "execveat": 281, "userfaultfd": 282,
}  # fmt: skip
# name -> (AUDIT_ARCH, refused, clone, tgkill, prlimit64, prctl)
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, 56, 234, 302, 157),
    "aarch64": (0xC00000B7, _AARCH64, 220, 131, 261, 167),
}
_CLONE3, _CLONE_THREAD, _EPERM, _ENOSYS = 435, 0x10000, 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LD, _JEQ, _JSET, _JGE, _RET = 0x20, 0x15, 0x45, 0x35, 0x06
_X32_BIT = 0x40000000

# linux/landlock.h: read and execute; and all that a program may do in its own folder.
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_FS_EXECUTE, _FS_WRITE, _FS_READ, _FS_READ_DIR = 1, 2, 4, 8
_FS_ALL = (1 << 13) - 1  # ABI 1; REFER (2), TRUNCATE (3), IOCTL_DEV (5) are added where the kernel has them
_READABLE = ("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")


class Uncontained(Exception):
    """The kernel refused a wall."""


def main() -> None:
    report, memory, file_bytes, seconds = map(int, sys.argv[1:5])
    secret, _, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        code = compile(program, "<generated>", "exec")
        shut_in(libc, memory, file_bytes, seconds, os.getcwd())
    except Uncontained as error:
        os.write(report, f"+cannot contain: {error}".encode())
        return
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        os.write(report, f"+{type(error).__name__}".encode())  # ValueError: a NUL or half a surrogate in the text
        return
    os.write(report, b"+")  # the clock starts
    os.write(report, _run(code, secret).encode("utf-8", "replace"))


def _run(code: object, secret: str) -> str:
    """What to tell the parent. The secret stays in this frame: the program's frames end before it is told."""
    try:
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})  # type: ignore[arg-type]
    except BaseException as error:  # whatever it raises, SystemExit included, it has failed
        return type(error).__name__[:200]
    return secret


def shut_in(libc: ctypes.CDLL, memory: int, file_bytes: int, seconds: int, folder: str | None) -> None:
    """From here on this process can use that much, write in `folder` (None: nowhere), and reach nothing else."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        raise Uncontained(f"needs Linux on {' or '.join(_MACHINES)}, this is {sys.platform} on {machine}")
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _prctl(libc, PR_SET_PDEATHSIG, SIGKILL)  # should the parent be killed, nobody else would stop this process
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, PR_SET_DUMPABLE, 0)
    _landlock(libc, folder)
    _seccomp(libc, machine)


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0):
        raise Uncontained(f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _landlock(libc: ctypes.CDLL, folder: str | None) -> None:
    """Files: Python's may be read, the given folder written; no other path can be opened, listed, made or removed."""
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 1:
        raise Uncontained("this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK)")
    handled = _FS_ALL | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    network = 3 if version >= 4 else 0  # TCP bind and connect: seccomp refuses sockets already
    scoped = 3 if version >= 6 else 0  # abstract Unix sockets and signals
    attributes = struct.pack("QQQ", handled, network, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE, attributes[:size], size, 0)
    if ruleset < 0:
        raise Uncontained(f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    readable = {*_READABLE, sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.base_prefix)}
    rights = [(path, _FS_READ | _FS_READ_DIR | _FS_EXECUTE) for path in readable if os.path.exists(path)]
    if folder is not None:
        rights.append((folder, handled & ~(1 << 15) & ~_FS_EXECUTE))
    for path, allowed in [*rights, ("/dev/null", _FS_WRITE)]:
        if not os.path.isdir(path):
            allowed &= _FS_EXECUTE | _FS_WRITE | _FS_READ
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=QI", allowed, descriptor), 0):
            raise Uncontained(f"landlock_add_rule {path}: {os.strerror(ctypes.get_errno())}")
        os.close(descriptor)
    if libc.syscall(_RESTRICT, ruleset, 0):
        raise Uncontained(f"landlock_restrict_self: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _seccomp(libc: ctypes.CDLL, machine: str) -> None:
    """System calls: those refused give EPERM; threads may be made, processes may not; signals reach oneself alone."""
    architecture, refused, clone, tgkill, prlimit, prctl = _MACHINES[machine]

    def step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    deny, number, low = step(_RET, _ERRNO | _EPERM), step(_LD, 0), 16  # arguments are 8 bytes each, from 16 on
    program = [step(_LD, 4), step(_JEQ, architecture, 1, 0), step(_RET, _KILL), number]
    if machine == "x86_64":
        program += [step(_JGE, _X32_BIT, 0, 1), step(_RET, _KILL)]  # the other names of the same calls
    program += [step(_JEQ, _CLONE3, 0, 1), step(_RET, _ERRNO | _ENOSYS)]  # the C library then uses clone
    program += [step(_JEQ, clone, 0, 4), step(_LD, low), step(_JSET, _CLONE_THREAD, 1, 0), deny, number]
    program += [step(_JEQ, tgkill, 0, 4), step(_LD, low), step(_JEQ, os.getpid(), 1, 0), deny, number]
    new_limit = (low + 16, low + 20)  # prlimit64's third argument: not null sets a limit
    program += [step(_JEQ, prlimit, 0, 6), step(_LD, new_limit[0]), step(_JEQ, 0, 0, 2)]
    program += [step(_LD, new_limit[1]), step(_JEQ, 0, 1, 0), deny, number]
    # prctl: nothing but naming a thread (15, 16).
    program += [step(_JEQ, prctl, 0, 5), step(_LD, low), step(_JEQ, 15, 2, 0), step(_JEQ, 16, 1, 0), deny, number]
    for call in sorted({*refused.values(), *_COMMON.values()}):
        program += [step(_JEQ, call, 0, 1), deny]
    program.append(step(_RET, _ALLOW))
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(filters), 0, 0):
        raise Uncontained(f"seccomp: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
