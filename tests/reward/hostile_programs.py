"""Programs that try to do harm or to cheat; each says ESCAPED if it got anywhere, and `contained` if it was refused.

Format: name, then what the reason of the grade must hold, then the program.
"""

# ruff: noqa: E501 - programs in one line each
from __future__ import annotations

REFUSED = "contained"
"""The program caught what it was refused with, and came to its end."""

# ESCAPED stands where the attack has worked; everything that is refused raises OSError or a limit ends the program.
_TRY = """
def attack():
{body}
try:
    attack()
    print("ESCAPED")
except (OSError, ImportError, MemoryError, RecursionError, AttributeError, ValueError) as error:
    print("contained")
"""


def tried(body: str) -> str:
    """A program around the lines of an attack."""
    return _TRY.format(body="\n".join("    " + line for line in body.strip().splitlines()))


READS_FILES = frozenset({"passwords", "processes", "the test file", "search for the test file", "symbolic link"})
"""Attacks that the mode `rlimits` does not stop."""

FILLS_SCRATCH = frozenset({"many files", "full scratch", "deep folders"})
"""Attacks on the scratch folder, which the mode `rlimits` stops by time only."""

PROGRAMS: dict[str, tuple[str, str]] = {
    # processes
    "fork": (REFUSED, tried("import os\nos.fork()")),
    "fork bomb": (
        REFUSED,
        "import os\nrefused = 0\nfor _ in range(1000):\n    try:\n        if os.fork() == 0:\n"
        "            while True: os.fork()\n    except OSError:\n        refused += 1\n"
        "print('contained' if refused == 1000 else 'ESCAPED')",
    ),
    "thread bomb": (
        REFUSED,
        "import threading\nevent = threading.Event()\nstarted = 0\ntry:\n    for _ in range(5000):\n"
        "        threading.Thread(target=event.wait, daemon=True).start()\n        started += 1\n"
        "except RuntimeError:\n    pass\nprint('contained' if started < 40 else 'ESCAPED')",
    ),
    "program": (REFUSED, tried("import subprocess\nsubprocess.run(['/usr/bin/python3', '-c', ''], check=True)")),
    "exec": (REFUSED, tried("import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(\"ESCAPED\")'])")),
    "daemon": (REFUSED, tried("import os\nos.setsid()\nif os.fork() == 0:\n    import time; time.sleep(1000)")),
    "zombies": (REFUSED, tried("import os\nfor _ in range(50):\n    if os.fork() == 0: os._exit(0)")),
    "clone into namespaces": (
        REFUSED,
        tried(
            "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "for flags in (0x10000000, 0x20000000, 0x00020000, 0x40000000):\n"
            "    if libc.unshare(flags) == 0: return\n"
            "raise OSError(ctypes.get_errno(), 'refused')"
        ),
    ),
    # memory, time, output, files
    "memory bomb": ("memory limit", "x = bytearray(8 << 30)"),
    "memory by growth": ("memory limit", "x = []\nwhile True: x.append(bytearray(1 << 22))"),
    "memory files": (REFUSED, tried("import os\nos.memfd_create('x')")),
    "shared memory": (
        REFUSED,
        tried("from multiprocessing.shared_memory import SharedMemory\nSharedMemory(create=True, size=1 << 20)"),
    ),
    "endless loop": ("time limit", "while True: pass"),
    "endless loop that ignores signals": (
        "time limit",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
    ),
    "sleep": ("time limit", "import time\ntime.sleep(1000)"),
    "waiting for input": (REFUSED, "import sys\nsys.stdin.read()\nprint('contained')"),
    "stopped": ("time limit", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"),
    "endless output": ("output limit", "while True: print('x' * 1000)"),
    "endless errors": ("output limit", "import sys\nwhile True: sys.stderr.write('x' * 1000)"),
    "output without pause": (
        "output limit",
        "import os\nblock = b'x' * 65536\nwhile True: os.write(1, block)",
    ),
    "huge file": ("file size limit", "f = open('x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))"),
    "sparse file": (
        "file size limit",
        "import os\nfd = os.open('x', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 1 << 40)\nprint('ESCAPED')",
    ),
    "many files": (
        REFUSED,
        tried("for i in range(100000):\n    with open(f'f{i}', 'w'): pass"),
    ),
    "full scratch": (
        REFUSED,
        tried("for i in range(1000):\n    with open(f'f{i}', 'wb') as f: f.write(b'x' * (1 << 20))"),
    ),
    "deep folders": (
        REFUSED,
        tried("import os\nfor i in range(100000):\n    os.mkdir('d'); os.chdir('d')"),
    ),
    "open files": (REFUSED, tried("kept = [open('/dev/null') for _ in range(10000)]")),
    "deep recursion": (
        "",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1) + 1\nf(0)\nprint('ESCAPED')",
    ),
    "recursion in C": (
        "",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n)\n"
        "x = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)\nA().x\nprint('ESCAPED')",
    ),
    "segmentation fault": ("SIGSEGV", "import ctypes\nctypes.string_at(0)"),
    # network
    "socket": (REFUSED, tried("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)")),
    "unix socket": (REFUSED, tried("import socket\nsocket.socket(socket.AF_UNIX).bind('\\\\0klear')")),
    "netlink": (REFUSED, tried("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)")),
    "name lookup": (REFUSED, tried("import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.socket()")),
    # files of the machine
    "home folder": (REFUSED, tried("import os\nos.listdir(os.path.expanduser('~root')) or os.listdir('/root')")),
    "passwords": (REFUSED, tried("open('/etc/passwd').read()")),
    "processes": (REFUSED, tried("import os\nos.listdir('/proc')")),
    "the test file": (REFUSED, tried("print(open('{secret}').read())")),
    "search for the test file": (
        REFUSED,
        "import os\nfound = [p for d, _, fs in os.walk('/') for p in fs if 'secret-of-the-test' in p]\n"
        "print('ESCAPED' if found else 'contained')",
    ),
    "symbolic link": (REFUSED, tried("import os\nos.symlink('{secret}', 'link')\nprint(open('link').read())")),
    "hard link": (REFUSED, tried("import os\nos.link('{secret}', 'link')\nprint(open('link').read())")),
    "write to the system": (REFUSED, tried("open('/usr/lib/evil.py', 'w').write('x')")),
    "write to the interpreter": (
        REFUSED,
        tried("import os\nopen(os.__file__, 'a').write('x')"),
    ),
    "write to the root": (REFUSED, tried("open('/evil', 'w').write('x')")),
    "remount": (
        REFUSED,
        tried(
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "if libc.mount(None, b'/', None, 0x20, None) != 0 and libc.mount(b'x', b'/scratch', b'tmpfs', 0, b'') != 0:\n"
            "    raise OSError(ctypes.get_errno(), 'refused')"
        ),
    ),
    "devices": (REFUSED, tried("import os, stat\nos.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))")),
    "set-uid": (REFUSED, tried("import os\nos.setuid(0)")),
    "environment": (
        REFUSED,
        "import os, sys\nnames = set(os.environ) - {'HOME', 'LANG', 'PATH', 'PWD', 'PYTHONHASHSEED', 'PYTHONHOME', "
        "'TMPDIR', 'LC_CTYPE', 'MALLOC_ARENA_MAX'}\nprint(f'ESCAPED {names} {sys.argv}' if names or len(sys.argv) > 1 else 'contained')",
    ),
    # other processes, and the one that grades
    "kill everything": (
        REFUSED,
        "import os\nkilled = []\nfor pid in [-1, 0, *range(1, 300)]:\n    if pid == os.getpid(): continue\n"
        "    for number in (9, 19):\n        try:\n            os.kill(pid, number); killed.append(pid)\n"
        "        except OSError: pass\nprint(f'ESCAPED {killed}' if killed else 'contained')",
    ),
    "kill the parent": (REFUSED, tried("import os, signal\nos.kill(os.getppid() or 1, signal.SIGKILL)")),
    # A file descriptor's owner is sent the signal of one's choice when there is something to read.
    "signal the parent through a pipe": (
        REFUSED,
        tried(
            "import fcntl, os\nread, write = os.pipe()\nfcntl.fcntl(read, fcntl.F_SETOWN, os.getppid() or 1)\n"
            "fcntl.fcntl(read, 10, 9)\nfcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)\nos.write(write, b'x')"
        ),
    ),
    "signal others by any of fcntl and ioctl": (
        REFUSED,
        "import fcntl, os, struct\nread, write = os.pipe()\npid = os.getppid() or 1\nworked = []\n"
        "for name, act in {\n"
        "    'F_SETOWN': lambda: fcntl.fcntl(read, 8, pid),\n"
        "    'F_SETOWN_EX': lambda: fcntl.fcntl(read, 15, struct.pack('ii', 1, pid)),\n"
        "    'F_SETSIG': lambda: fcntl.fcntl(read, 10, 9),\n"
        "    'F_SETLEASE': lambda: fcntl.fcntl(os.open('leased', os.O_CREAT), 1024, 0),\n"
        "    'F_NOTIFY': lambda: fcntl.fcntl(os.open('.', 0), 1026, 1),\n"
        "    'O_ASYNC': lambda: fcntl.fcntl(read, 4, os.O_ASYNC),\n"
        "    'FIOSETOWN': lambda: fcntl.ioctl(read, 0x8901, struct.pack('i', pid)),\n"
        "    'SIOCSPGRP': lambda: fcntl.ioctl(read, 0x8902, struct.pack('i', pid)),\n"
        "    'FIOASYNC': lambda: fcntl.ioctl(read, 0x5452, struct.pack('i', 1)),\n"
        "}.items():\n    try: act(); worked.append(name)\n    except PermissionError: pass\n"
        "    except OSError as error: worked.append(f'{name} {error}')\n"
        "print(f'ESCAPED {worked}' if worked else 'contained')",
    ),
    "other ways to send a signal": (
        REFUSED,
        # timer_create, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_open, pidfd_send_signal, tkill, PR_SET_PDEATHSIG
        "import ctypes, os, platform\nlibc = ctypes.CDLL(None, use_errno=True)\npid = os.getppid() or 1\nworked = []\n"
        "info = ctypes.create_string_buffer(128)\n"
        "numbers = (222, 129, 297, 434, 424, 200, 157)\n"
        "if platform.machine() == 'aarch64': numbers = (107, 138, 240, 434, 424, 130, 167)\n"
        "calls = ((1, None, info), (pid, 9, info), (pid, pid, 9, info), (pid, 0), (3, 9, None, 0), (pid, 9), (1, 9, 0, 0, 0))\n"
        "for number, arguments in zip(numbers, calls):\n"
        "    if libc.syscall(number, *arguments) >= 0 or ctypes.get_errno() != 1: worked.append(number)\n"
        "print(f'ESCAPED {worked}' if worked else 'contained')",
    ),
    "trace the parent": (
        REFUSED,
        tried(
            "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "if libc.ptrace(16, os.getppid(), 0, 0) != 0: raise OSError(ctypes.get_errno(), 'refused')"
        ),
    ),
    "read the parent's memory": (
        REFUSED,
        tried(
            "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nbuffer = ctypes.create_string_buffer(8)\n"
            "pair = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)\n"
            "remote = (ctypes.c_void_p * 2)(id(0), 8)\n"
            "if libc.process_vm_readv(os.getppid(), pair, 1, remote, 1, 0) < 0:\n"
            "    raise OSError(ctypes.get_errno(), 'refused')"
        ),
    ),
    "raise its limits": (
        REFUSED,
        "import resource\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n    try:\n"
        "        resource.setrlimit(kind, (-1, -1)); print('ESCAPED')\n    except (OSError, ValueError): pass\n"
        "print('contained')",
    ),
    "inherited files": (
        REFUSED,
        "import os\nopened = []\nfor fd in range(3, 2048):\n    try: os.fstat(fd); opened.append(fd)\n"
        "    except OSError: pass\nprint(f'ESCAPED {opened}' if opened else 'contained')",
    ),
    "write to every file descriptor": (
        "line 1",
        "import os\nfor fd in range(3, 2048):\n    try: os.write(fd, b'\\0' * 64); print('ESCAPED', fd)\n"
        "    except OSError: pass\nprint('contained')",
    ),
    "keys": (
        REFUSED,
        tried(
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "if libc.syscall(248, b'user', b'k', b'v', 1, -3) < 0: raise OSError(ctypes.get_errno(), 'refused')"
        ),
    ),
    "io_uring, bpf, userfaultfd, perf": (
        REFUSED,
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nworked = []\n"
        "for number in (425, 321, 323, 298, 310, 101, 165, 272, 308, 434, 438, 319, 29, 68, 240):\n"
        "    if libc.syscall(number, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() not in (1, 38): worked.append(number)\n"
        "print(f'ESCAPED {worked}' if worked else 'contained')",
    ),
    "x32 system calls": (
        REFUSED,
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print('ESCAPED' if libc.syscall(0x40000000 + 39) > 0 else 'contained')",
    ),
    # ending in an unusual way
    "os._exit": ("line 1", "import os\nos._exit(0)"),
    "exit status": ("exit status 3", "import sys\nsys.exit(3)"),
    "patched exit": ("", "import sys, os\nsys.exit = os._exit = exit = lambda *a: None\nraise SystemExit(0)"),
    "closed output": ("line 1", "import os\nos.close(1)\nos.close(2)"),
    "closed output, slowly": ("time limit", "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)"),
    "signals itself": ("SIGKILL", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
    "abort": ("SIGABRT", "import os\nos.abort()"),
    "exit handlers": ("time limit", "import atexit\natexit.register(lambda: exec('while True: pass'))"),
    "thread that never ends": (
        "time limit",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    ),
    "control characters": ("line 1", "print('\\x1b[2J\\x1b]0;owned\\x07\\0')"),
    "no text": ("line 1", "import os\nos.write(1, bytes(range(256)))"),
}
