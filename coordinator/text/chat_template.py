"""The prompt that a model's chat template makes of a conversation; it is rendered by `template_process.py`."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from warmfront.shared.errors import ModelError
from warmfront.shared.machine.process import python_module_command

__all__ = ["CHATML", "DIALOGUE", "DIALOGUE_END", "render"]

# For a model that comes without a template and has a token for the end of a turn: what most were trained on.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# For one without either: it knows texts, not turns, and an answer as ChatML would never end. And what ends an answer.
DIALOGUE = (
    "{% for message in messages %}"
    "{{ {'user': 'User: ', 'assistant': 'Assistant: '}.get(message['role'], '') }}{{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
DIALOGUE_END = "\nUser:"

CPU_S = 1  # of computing: no real template takes a hundredth of it
_TIMEOUT_S = 30.0  # of waiting, on a machine that gives it no time to compute


def render(
    name: str,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt for the next answer to `messages`. `tokens`: texts of special tokens, such as bos_token.

    Raises ModelError, naming the model `name`, for a template that fails or does not end in time.
    """
    variables = {
        "messages": [dict(message) for message in messages],
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": True,
        **tokens,
    }
    now = datetime.now().isoformat()
    request = {"template": template, "variables": variables, "now": now, "cpu_s": CPU_S}
    command = python_module_command("warmfront.coordinator.text.template_process")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            out, err = process.communicate(json.dumps(request).encode(), _TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ModelError(f"the chat template of {name} does not end within {_TIMEOUT_S:.0f} s") from None
        finally:
            process.kill()
            process.wait()  # Popen's own exit skips it after Ctrl-C, and would leave a zombie
    if process.returncode < 0:
        raise ModelError(f"the chat template of {name} does not end within {CPU_S} s")
    if process.returncode:
        why = err.decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(f"the chat template of {name} cannot be rendered: {why}")
    answer: dict[str, str] = json.loads(out)
    if "error" in answer:
        raise ModelError(f"the chat template of {name} fails: {answer['error']}")
    return answer["text"]
