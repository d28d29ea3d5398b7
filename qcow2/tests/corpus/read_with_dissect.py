"""Reads parts of QCOW2 images with dissect: a JSON request on each line of the input, the path of a file with the bytes
on each line of the output. It knows nothing of what they ought to be."""

import json
import signal
import sys
from pathlib import Path

from dissect.hypervisor.disk.qcow2 import QCow2

for line in sys.stdin:
    request = json.loads(line)
    # A reader that never ends is killed: the test is told so by the end of the output.
    signal.alarm(100)
    image = QCow2(Path(request["image"]))
    stream = image.open()
    if request["snapshot"] is not None:
        stream = next(s for s in image.snapshots if s.name == request["snapshot"]).open()
    with open(request["out"], "wb") as out:
        for start, length in request["parts"]:
            stream.seek(start)
            out.write(stream.read(length))
    print("done", flush=True)
