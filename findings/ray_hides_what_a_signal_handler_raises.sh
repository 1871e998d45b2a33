#!/usr/bin/env bash
# Ray 2.60.0: what a signal handler raises while ray.wait or ray.get waits comes out as a SystemError.
#
# A program that ends in order raises an exception of its own from its handler of SIGTERM and catches it further up.
# Ray calls the handlers while it waits. It passes KeyboardInterrupt on, and no other exception: that is left beside
# a result, the interpreter objects, and the handler's exception is only the cause of what arrives.
# Seen: SystemError "returned a result with an exception set" from both; `except Stopped` is not reached.
# Expected: the handler's exception, as time.sleep or a lock of the standard library give it.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/waits.py" <<'PYTHON'
import os
import signal
import sys
import threading
import time

import ray


class Stopped(Exception):
    pass


def stop(number, frame):
    raise Stopped


@ray.remote
def long():
    time.sleep(60)


def seen(wait):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        wait()
    except BaseException as error:
        return type(error).__name__, type(error.__cause__).__name__
    return None


ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
task = long.remote()
found = []
for handler in (signal.default_int_handler, stop):
    signal.signal(signal.SIGUSR1, handler)
    found += [seen(wait) for wait in (lambda: ray.wait([task], timeout=10), lambda: ray.get(task, timeout=10),
                                      lambda: time.sleep(10))]
print(f"ray {ray.__version__}: {found}")
interrupted = [("KeyboardInterrupt", "NoneType")] * 3
sys.exit(0 if found == [*interrupted, *[("SystemError", "Stopped")] * 2, ("Stopped", "NoneType")] else 1)
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 "$folder/venv/bin/python" -W ignore "$folder/waits.py"
