"""The server as a deployment of Ray Serve, on a cluster of two nodes in this machine; skipped without the extra `ray`.

pytest tests/integration/test_ray_serve.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.usefixtures("compiled")

# In a process of its own, which takes with it what Ray leaves running.
PROGRAM = """
import json, socket, sys, urllib.request
import ray
from ray import serve
from ray.cluster_utils import Cluster
from warmfront.serve_app import deployment

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
nodes = len([node for node in ray.nodes() if node["Alive"]])
serve.start(http_options={"port": port})
serve.run(deployment({"model": sys.argv[1], "name": "smol", "replicas": "1:2", "threads": "1", "context": "512"}))
url = f"http://127.0.0.1:{port}/v1/completions"
body = {"prompt": "The sea", "max_tokens": 6, "temperature": 0}

def ask(**more):
    request = urllib.request.Request(url, json.dumps(body | more).encode())
    return urllib.request.urlopen(request, timeout=120).read().decode()

whole = json.loads(ask())["choices"][0]["text"]
events = [line[6:] for line in ask(stream=True).splitlines() if line.startswith("data: {")]
streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events)
print("RESULT " + json.dumps({"nodes": nodes, "whole": whole, "streamed": streamed, "events": len(events)}))
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


def test_two_nodes(smollm2: Path) -> None:
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, os.fspath(smollm2)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    told = json.loads(line.removeprefix("RESULT "))
    assert told["nodes"] == 2
    assert told["whole"] == told["streamed"]
    assert told["events"] > 2
