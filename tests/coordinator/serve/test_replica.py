"""What the arguments of `serve run` mean.  pytest tests/coordinator/serve/test_replica.py"""

import pytest

pytest.importorskip("starlette")
from warmfront.coordinator.serve.replica import replica_options
from warmfront.shared.errors import UsageError


def test_arguments_are_texts() -> None:
    made, settings = replica_options(
        {"model": "/m/x.gguf", "replicas": "1:4", "cpus": "8", "threads": "4", "dtype": "q4"}
    )
    assert made == {"model": "/m/x.gguf", "name": "x.gguf", "keys": (), "options": {"threads": 4, "dtype": "q4"}}
    assert settings["autoscaling_config"]["min_replicas"] == 1
    assert settings["autoscaling_config"]["max_replicas"] == 4
    assert settings["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 0}


def test_keys_and_a_fixed_number() -> None:
    made, settings = replica_options({"api_key": "k", "replicas": "2", "name": "n"})
    assert (made["keys"], made["name"]) == (("k",), "n")
    assert settings["autoscaling_config"]["min_replicas"] == settings["autoscaling_config"]["max_replicas"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replicas": "many"}, "replicas, cpus and gpus are numbers"),
        ({"replicas": "4:1"}, "the lower number first"),
        ({"replicas": "0"}, "1 or more"),
        ({"thread": "4"}, "no such setting: thread"),
    ],
)
def test_what_is_wrong_is_said_before_a_replica_starts(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replica_options(arguments)
