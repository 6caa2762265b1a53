"""The options that several commands share, and the types of their values."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from warmfront.coordinator.extras import require
from warmfront.shared.config import (
    ACTIVATIONS,
    BITS,
    CORE_SCORES,
    DTYPES,
    KV_TYPES,
    POLICIES,
    SPECULATIONS,
    EngineConfig,
    Sampling,
    parse_size,
)
from warmfront.shared.errors import UsageError
from warmfront.shared.files import check_writable
from warmfront.shared.offload import OFFLOAD_POLICIES, PRESETS
from warmfront.shared.selector import SELECTORS

__all__ = [
    "Numbers",
    "Size",
    "Sizes",
    "activation_option",
    "chat_template_option",
    "dtype_option",
    "engine_options",
    "load_options",
    "plot_option",
    "predictor_option",
    "prompt_options",
    "run_options",
    "sampling_options",
    "selector_option",
    "split_options",
    "text_option",
]

_ENGINE, _SAMPLING = EngineConfig(), Sampling()
if TYPE_CHECKING:
    _SizeType = click.ParamType[int]
    _NumbersType = click.ParamType[list[int]]
else:  # cannot be subscripted before click 8.4
    _SizeType = _NumbersType = click.ParamType


class Size(_SizeType):
    """512MB, 1.5GiB, 8G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Numbers(_NumbersType):
    """1,2,3."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers: write it like 1,2,3", param, ctx)


class Sizes(_NumbersType):
    """512MB,2G."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        return [Size().convert(part, param, ctx) for part in str(value).split(",")]


def split_options(options: dict[str, Any]) -> tuple[str, dict[str, Any], Sampling, tuple[str, ...]]:
    """Values of `engine_options` and `sampling_options`: the model, fields of EngineConfig, sampling, stop strings."""
    overrides = dict(options)
    model, stop = overrides.pop("model"), overrides.pop("stop")
    sampling = Sampling(**{name: overrides.pop(name) for name in Sampling.__dataclass_fields__})
    return model, overrides, sampling, stop


def _drawable(_context: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """What a picture needs is asked for before minutes of measuring."""
    if path is not None:
        check_writable(path)
        require("matplotlib", "--plot")
    return path


def plot_option(what: str) -> Callable[[Any], Any]:
    """`--plot FILE`, whose help says `what` is drawn."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("--plot", type=kind, callback=_drawable, help=f"{what}, as a PNG, or FILE.svg.")


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator for all `options`, listed in the help in this order."""

    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _setting(flag: str, help: str, choices: Iterable[str] | None = None, **more: Any) -> Callable[[Any], Any]:
    """The option `flag`, whose default is that of the field of EngineConfig with its name; `choices`: its values."""
    if choices is not None:
        more["type"] = click.Choice(list(choices))
    default = getattr(_ENGINE, flag.removeprefix("--").partition("/")[0].replace("-", "_"))
    return click.option(flag, default=default, show_default=True, help=help, **more)


selector_option = _setting(
    "--selector",
    "Which neurons are computed; auto: lowrank with predictors, else exact where it loses nothing, else all.",
    SELECTORS,
)
dtype_option = _setting("--dtype", "Weights in memory.", DTYPES)
activation_option = _setting(
    "--activation", f"Of the feed-forward layers: {', '.join(ACTIVATIONS)}; auto: what the model was trained with."
)
text_option = click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A file of text in UTF-8; may be repeated.",
)
predictor_option = click.option(
    "--predictor",
    type=click.Path(dir_okay=False),
    help="Selector lowrank: a file of `warmfront train-predictor` instead of the model's own predictors.",
)
load_options = _together(
    dtype_option,
    activation_option,
    predictor_option,
    click.option(
        "--bits",
        type=click.Choice([str(bits) for bits in BITS]),
        default=str(_ENGINE.bits),
        show_default=True,
        callback=lambda _ctx, _param, value: int(value),
        help="Selector lowbit: bits of a weight in its copies.",
    ),
    click.option(
        "--recall", type=float, help="Selector lowbit: recall by mass [default: 0.995; 0.9 where no gate closes]"
    ),
    click.option("--max-loss", type=float, help="Selectors lowbit, core: losing more nats a token, they give way."),
    _setting("--keep", "Selector core: share it keeps."),
    _setting("--core-score", "Selector core: how the tokens of a text score its neurons.", CORE_SCORES),
    _setting("--refresh", "Selector core: chosen again every so many tokens; 0: never."),
    click.option("--workers", type=int, help="CPU worker processes [default: one per NUMA node]"),
    click.option("--threads", type=int, help="Compute threads in all [default: one per core]"),
    click.option("--coordinator-threads", type=int, help="Threads of attention [default: as many as the workers']"),
    click.option("--spins", type=int, help="Rounds of spinning at a barrier [default: 100; 0 where cores are shared]"),
    click.option("--force", is_flag=True, help="Allow more threads than cores."),
    _setting("--pin/--no-pin", "Keep threads and memory in place."),
    _setting("--tuning/--no-tuning", "Use what `tune` found, and measure what is missing."),
    _setting("--gpu", "auto, none, cuda:N, or host: an emulated GPU."),
    click.option("--vram-budget", type=Size(), help="GPU memory for warmfront, such as 6GB."),
    click.option(
        "--offload",
        type=click.Choice(list(PRESETS)),
        help="Keep a part of the neurons in memory, and read the others from the disk as needed.",
    ),
    click.option("--ram-budget", type=Size(), help="Memory for the neurons, which are read from the disk as needed."),
    _setting("--offload-policy", "With --ram-budget: which neurons leave the memory first.", OFFLOAD_POLICIES),
    _setting("--offload-window", "Policy window: keep what so many tokens used."),
)
run_options = _together(
    load_options,
    _setting("--attention", "Where attention runs: auto, cpu, cuda:N, or host: torch on the CPU."),
    _setting("--kv", "Keys and values in the KV cache; auto: f16, or f32 with weights in f32.", KV_TYPES),
    _setting("--policy", "How neurons move between the workers.", POLICIES),
    click.option("--plan", type=click.Path(dir_okay=False), help="Begin with this plan, from `warmfront plan`."),
    click.option("--look-ahead", is_flag=True, help="Predict a layer's neurons while the one before is computed."),
    click.option("--verify", is_flag=True, help="Check that each selected neuron is computed exactly once."),
    click.option("--slow", metavar="cpuN:FACTOR", help="Emulation: make CPU workers slower, such as cpu0:4."),
)
engine_options = _together(
    click.option(
        "-m",
        "--model",
        type=click.Path(),
        default="smollm2-135m",
        show_default=True,
        help="GGUF file, Hugging Face folder, or a name of the hub: ORG/NAME, ORG/NAME:Q4_K_M.",
    ),
    selector_option,
    run_options,
    _setting("--speculate", "Compute tokens ahead that the text repeats; the answer is the same.", SPECULATIONS),
    click.option("--ctx", "context", type=int, help="Tokens of context [default: the model's, at most 4096]"),
)
chat_template_option = click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="A file with a Jinja template instead of the model's.  [default: the model's, else ChatML, ...]",
)
prompt_options = _together(
    click.option("-p", "--prompt", help="Text to continue; - reads it from stdin, as does a pipe without -p."),
    click.option("--prompt-ids", type=Numbers(), help="Exact token ids instead of text: 1,2,3."),
    click.option("-f", "--file", type=click.Path(path_type=Path), help="A file with the text, in UTF-8."),
    click.option("--chat", "as_chat", is_flag=True, help="The text is a user's turn in the model's chat template."),
    click.option("--system", help="With --chat: a system prompt."),
    chat_template_option,
)
sampling_options = _together(
    click.option("--temperature", type=float, default=_SAMPLING.temperature, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=_SAMPLING.top_k, show_default=True, help="0 is off."),
    click.option("--top-p", type=float, default=_SAMPLING.top_p, show_default=True),
    click.option("--min-p", type=float, default=_SAMPLING.min_p, show_default=True),
    click.option("--repetition-penalty", type=float, default=_SAMPLING.repetition_penalty, show_default=True),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--stop", multiple=True, help="End the answer before this text; may be repeated."),
)
