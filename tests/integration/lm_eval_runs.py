"""What `test_lm_eval.py` runs, apart from pytest: lm-eval's tasks on this engine and on transformers; prints JSON.

    python -m tests.integration.lm_eval_runs TASK_FOLDER MODEL.gguf

TASK_FOLDER has the tasks `choice` and `answer`. The JSON has the responses to each request, by model and task.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.integration.reference import llama_from_gguf
from warmfront.coordinator.harness.lm_eval_model import WarmfrontLM
from warmfront.coordinator.models.open import open_source


def reference(path: Path) -> HFLM:
    """SmolLM2 in transformers, with its own tokenizer."""
    files = open_source(path).tokenizer
    assert files is not None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(files.json), **files.special_tokens)
    tokenizer.chat_template = files.chat_templates["default"]
    model = llama_from_gguf(path)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, device="cpu")


def evaluated(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """The scores of the tasks, and what the model has said to each request."""
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["choice", "answer"],
        task_manager=tasks,
        bootstrap_iters=0,
        apply_chat_template=True,
        **options,
    )
    said = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return {"said": said, "accuracy": found["results"]["choice"]["acc,none"]}


def requests(*arguments: tuple[str, ...]) -> list[Any]:
    """As lm-eval makes them."""
    return [SimpleNamespace(args=each) for each in arguments]


def prompts_of(lm: WarmfrontLM, pairs: list[Any]) -> list[int]:
    """How many tokens each job has that is more than a decoded token, while `pairs` are scored."""
    session, sizes = lm.engine.session, list[int]()
    run = session.run

    def counted(batch: list[tuple[Any, list[int]]], **options: Any) -> None:
        sizes.append(sum(len(tokens) for _, tokens in batch))
        run(batch, **options)

    session.run = counted
    lm.loglikelihood(pairs)
    return [size for size in sizes if size > 1]


def main(folder: Path, path: Path) -> None:
    """Print the results of both."""
    ours = evaluated("warmfront", folder, model_args=f"pretrained={path},dtype=f32,selector=all")
    hf = reference(path)
    results = {"warmfront": ours, "transformers": evaluated(hf, folder)}
    text = "The keeper rowed across on Sundays. Nobody came in winter."
    request = requests((text,))
    with_window = WarmfrontLM(str(path), dtype="f32", context=8)
    rolling = {"warmfront": with_window.loglikelihood_rolling(request)}
    context = "The keeper rowed across"
    prompts = prompts_of(with_window, requests((context, " on"), ("Other words here", " too"), (context, " in winter")))
    with_window.close()
    hf._max_length = 8
    rolling["transformers"] = hf.loglikelihood_rolling(request)
    print(json.dumps(results | {"rolling": rolling, "prompts": prompts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
