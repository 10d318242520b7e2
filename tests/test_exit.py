"""The interpreter ends while calls run: they end too, or wait for the process, which exits as it would have."""

import os
import subprocess
import sys

import pytest

CALLS = """
import normkit, numpy as np

def call(size=5000):
    x = np.ones((2, 3, size), "f4")
    normkit.instance_norm_backward(x, normkit.instance_norm(x), np.zeros((2, 3)), np.ones((2, 3)))

def forever():
    while True:
        call()
"""
ENDS = {
    "daemon": """
import threading, time
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.1)
""",
    "daemon, tiny calls": """
import threading, time
threading.Thread(target=lambda: [call(5) for _ in iter(int, 1)], daemon=True).start()
time.sleep(0.1)
""",
    "pool": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(3)
[pool.submit(call) for _ in range(50)]
""",
    "atexit": """
import atexit, threading
threading.Thread(target=forever, daemon=True).start()
atexit.register(call)
""",
    "exit from a thread": """
import os, threading, time
threading.Thread(target=forever, daemon=True).start()
threading.Thread(target=lambda: (call(), os._exit(0))).start()
""",
    "fork after threads": """
import os, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
thread = threading.Thread(target=call)
thread.start(), thread.join()
child = os.fork()
call()
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
    "error": """
import threading, time
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.1)
raise SystemExit(0)
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_process_exits(end):
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", CALLS + ENDS[end]],
            env={**os.environ, "NORMKIT_NUM_THREADS": "3"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
