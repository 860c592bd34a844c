"""The sandbox: every way a run can end, and what code in it cannot do."""

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest

from nanozhchat import sandbox
from tests.conftest import refused

SLOW_SPAM = "import time\nwhile True:\n    print('x', flush=True)\n    time.sleep(0.01)"
LANDLOCK_CREATE_RULESET, ASK_VERSION = 444, 1  # asked of the kernel itself: a sandbox that lost a level must fail
HAS_LANDLOCK = sys.platform == "linux" and ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, ASK_VERSION) > 0
level_2 = pytest.mark.skipif(not HAS_LANDLOCK, reason="the kernel has no Landlock")


@pytest.mark.parametrize(("code", "status"), [
    ("print(6 * 7)", "ok"), ("", "ok"), ("1/0", "error"), ("?", "error"), ("raise SystemExit", "error"),
    ("import os; os._exit(0)", "error"), ("while True: pass", "timeout"), ("import time; time.sleep(60)", "timeout"),
    (SLOW_SPAM, "timeout"), ("x = 'a' * 10**10", "oom"), ("x = []\nwhile True: x.append('a' * 10**6)", "oom"),
    ("while True: print('x' * 1000)", "output_limit"), ("import ctypes; ctypes.string_at(0)", "killed"),
    ("def f(): f()\nf()", "error"), ("\ud800", "error"), ("open('a', 'w').write('x' * 2**25)", "error"),
])  # fmt: skip
def test_every_end_has_its_status(code, status):
    result = sandbox.run_python(code, timeout_s=0.5 if status == "timeout" else 30.0)
    assert result.status == status, result
    assert len(result.stdout) <= sandbox.OUTPUT_BYTES


def test_output_comes_back_and_the_folder_may_be_used_and_is_gone():
    code = "import os\nopen('文件', 'w').write('你好')\nprint(open('文件').read(), os.getcwd(), dict(os.environ))\n1/0"
    result = sandbox.run_python(code, timeout_s=30.0)
    said, folder, environment = result.stdout.split(maxsplit=2)
    assert (said, result.status) == ("你好", "error")
    assert "ZeroDivisionError" in result.stderr
    assert not os.path.exists(folder)
    assert not set(eval(environment)) - {"LC_CTYPE", "PWD"}


def test_the_level_is_what_the_probe_could_not_do(monkeypatch):
    found, acts = sandbox.probe()
    assert (found >= (2 if HAS_LANDLOCK else 1), found == 1) == (True, bool(acts))
    sandbox.require(found)
    monkeypatch.setattr(sandbox, "probe", lambda: (1, ("connect",)))
    refused("level 1 .* could connect; .*--unsafe-sandbox", sandbox.require, 2)


def test_the_probe_sees_an_open_door(monkeypatch, tmp_path):
    source = Path(sandbox.sandbox_child.__file__).read_text(encoding="utf-8")
    door = tmp_path / "open.py"
    door.write_text(source.replace('sys.platform == "linux"', "False"), encoding="utf-8")
    monkeypatch.setattr(sandbox.sandbox_child, "__file__", str(door))
    monkeypatch.setattr(sandbox, "_jail", lambda: ())
    found, acts = sandbox.probe.__wrapped__()
    assert found == 1
    assert {"read a file", "write a file", "connect", "start a process", "signal another process"} <= set(acts)


@level_2
@pytest.mark.parametrize("act", [
    "open('/etc/passwd')", "open('/proc/self/environ')", "__import__('os').listdir('/')", "open('/tmp/x', 'w')",
    "__import__('socket').socket()", "__import__('os').fork()", "__import__('subprocess').run(['true'])",
    "__import__('os').execv('/bin/true', ['true'])", "__import__('os').kill(1, 0)",
    "__import__('os').truncate('/etc/passwd', 0)", "__import__('os').chmod('/etc/passwd', 0o644)",
    "__import__('os').symlink('/etc/passwd', 'p') or open('p')", "__import__('os').link('/etc/passwd', 'p')",
    "__import__('resource').setrlimit(0, (60, 60))", "__import__('os').unlink('/etc/hostname')",
])  # fmt: skip
def test_level_2_refuses(act):
    code = f"try:\n    {act}\nexcept (OSError, ValueError) as e:\n    print('refused', type(e).__name__)"
    result = sandbox.run_python(code, timeout_s=30.0)
    assert result.stdout.startswith("refused"), result


@level_2
def test_level_2_still_allows_threads_and_the_standard_library():
    code = "import threading, math, json, re, collections, itertools, datetime, random, decimal, fractions\n"
    code += "t = threading.Thread(target=lambda: print(math.pi)); t.start(); t.join()"
    assert sandbox.run_python(code, timeout_s=30.0) == sandbox.Result("ok", "3.141592653589793\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_running():
    before = set(os.listdir("/proc"))
    sandbox.run_python("import time\ntime.sleep(60)", timeout_s=0.3)
    time.sleep(0.1)
    new = [Path("/proc", p, "cmdline") for p in set(os.listdir("/proc")) - before if p.isdigit()]
    assert [path for path in new if path.exists() and b"sandbox_child" in path.read_bytes()] == []
