"""lm-eval gets of the engine what it gets of transformers, on tasks from local files, and so by its command line.

Run: pytest tests/integration/test_lm_eval.py
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(
        find_spec("lm_eval") is None or find_spec("accelerate") is None,
        reason="lm-eval and accelerate are not installed",
    ),
    pytest.mark.usefixtures("compiled"),
]

CHOICES = [
    ("The capital of France is", ["Paris", "Rome", "the sea"], 0),
    ("Ice is frozen", ["water", "fire and smoke"], 0),
    ("Two and two is", ["five", "four", "a chair"], 1),
]
QUESTIONS = ["Name a colour.", "What do cows give?"]
TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - metric: acc
""",
    "answer": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n\\n", "."]
  max_gen_toks: 16
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "choice": [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in CHOICES],
        "answer": [{"question": question, "answer": ""} for question in QUESTIONS],
    }
    for task, described in TASKS.items():
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        source = (
            f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        )
        (folder / f"{task}.yaml").write_text(source + described)
    return folder


def finished(tasks: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def results(smollm2: Path, tasks: Path) -> dict[str, Any]:
    run = finished(tasks, "tests.integration.lm_eval_runs", tasks, smollm2)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_log_likelihoods(results: dict[str, Any]) -> None:
    ours, theirs = (results[model]["said"]["choice"] for model in ("warmfront", "transformers"))
    assert [len(document) for document in ours] == [len(choices) for _, choices, _ in CHOICES]
    for document, expected in zip(ours, theirs, strict=True):
        for ((chance, greedy),), ((wanted, wanted_greedy),) in zip(document, expected, strict=True):
            assert float(chance) == pytest.approx(float(wanted), abs=1e-3)
            assert greedy == wanted_greedy
    assert results["warmfront"]["accuracy"] == results["transformers"]["accuracy"]


def test_answers(results: dict[str, Any]) -> None:
    ours, theirs = (results[model]["said"]["answer"] for model in ("warmfront", "transformers"))
    assert ours == theirs
    assert all(text and "." not in text for ((text,),) in ours)


def test_rolling_in_windows(results: dict[str, Any]) -> None:
    assert results["rolling"]["warmfront"] == pytest.approx(results["rolling"]["transformers"], abs=1e-3)


def test_a_context_is_computed_once_for_all_that_follows(results: dict[str, Any]) -> None:
    assert len(results["prompts"]) == 2


def test_the_command_line_says_what_is_wrong_in_a_line(tasks: Path) -> None:
    command = ["warmfront.coordinator.harness", "run", "--tasks", "choice", "--include_path", tasks]
    run = finished(tasks, *command, "--model", "warmfront", "--model_args", "pretrained=smollm2-135m,selectr=all")
    assert run.returncode == 2, run.stderr[-3000:]
    assert run.stderr.splitlines()[-1].startswith("warmfront: --model_args selectr:")
    assert "Traceback" not in run.stderr
