"""Answers that fit a JSON schema or a grammar: which tokens may come next, by llguidance."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.serve.errors import invalid
from warmfront.coordinator.serve.schema import ChatRequest, GenerationRequest, NamedTool, Tool
from warmfront.coordinator.text.constraint import FORBIDDEN
from warmfront.coordinator.text.parts import Parts
from warmfront.shared.errors import ModelError

__all__ = ["Grammar", "Grammars"]

Grammar = llguidance.LLMatcher

# White space where JSON allows any: a small model may write nothing else for ever.
_COMPACT: Any = {"whitespace_flexible": False}
# Symbols of a grammar, about 15 for a property of a schema: a second to prepare, and its square for more.
_LIMITS = llguidance.LLParserLimits(max_grammar_size=25_000)
# Letters of what an answer begins with, such as </think> or the head of a message.
_HEAD = 128
Floats = npt.NDArray[np.float32]


class Grammars:
    """Makes constraints for one model; the vocabulary is prepared at first use."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None

    def wanted(self, request: GenerationRequest) -> Grammar | None:
        """The grammar that a request asks for, before its first token; None if it asks for none.

        Raises ApiError for one that is none.
        """
        if request.grammar is not None:
            return self._checked(_grammar(request.grammar), "grammar")
        if not isinstance(request, ChatRequest):
            return None
        if request.tools and (request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)):
            return self._schema(_schema_of_calls(_chosen(request.tools, request.tool_choice)), "tools")
        form = request.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return self._schema({"type": "object"}, "response_format")
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise invalid("response_format: json_schema needs a schema", "response_format")
        return self._schema(form.json_schema.schema_, "response_format")

    def constraint(self, grammar: Grammar, parts: Parts | None) -> "_Held":
        """A constraint for one answer, of which only what comes behind its reasoning is held to it."""
        return _Held(grammar.deep_copy(), self._engine, parts)

    def _schema(self, schema: dict[str, Any] | bool, param: str) -> Grammar:
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{param}: {_first_line(error)}", param) from None
        return self._checked(grammar, param)

    def _checked(self, grammar: str, param: str) -> Grammar:
        matcher = llguidance.LLMatcher(self._vocabulary(), grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise invalid(f"{param}: {_first_line(matcher.get_error())}", param)
        return matcher

    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                model = self._engine.model
                if not self._engine.tokenizer.present:
                    raise invalid(f"{model.spec.name} came without a tokenizer: no grammar can hold its answers")
                vocabulary = llguidance.TokenizerWrapper(_Vocabulary(self._engine))
                ends = sorted(self._engine.tokenizer.end_ids)
                self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=model.spec.vocab, eos_token=ends or None)
            return self._tokenizer


class _Vocabulary:
    """A model's tokens as llguidance takes them: their bytes; those that are not text are special."""

    bos_token_id = None

    def __init__(self, engine: Engine) -> None:
        tokenizer, vocab = engine.tokenizer, range(engine.model.spec.vocab)
        self.tokens = [tokenizer.bytes_of(token) for token in vocab]
        self.special_token_ids = [token for token in vocab if not self.tokens[token]]
        for token in self.special_token_ids:
            self.tokens[token] = f"<|special {token}|>".encode()
        self.eos_token_id = min(tokenizer.end_ids, default=self.special_token_ids[0] if self.special_token_ids else 0)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, with_start=False)


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _grammar(text: str) -> str:
    """A grammar in GBNF, as llama.cpp has it, or in Lark's form."""
    try:
        return llguidance.gbnf_to_lark.any_to_lark(text)
    except Exception as error:  # whatever a text that is no grammar leads to
        raise invalid(f"grammar: {_first_line(error)}", "grammar") from None


def _chosen(tools: Sequence[Tool], choice: object) -> list[Tool]:
    if not isinstance(choice, NamedTool):
        return list(tools)
    chosen = [tool for tool in tools if tool.function.name == choice.function.name]
    if not chosen:
        raise invalid(f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice")
    return chosen


def _schema_of_calls(tools: Sequence[Tool]) -> dict[str, Any]:
    """One call of one of the tools, as an object that `CallParser` knows."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                # Unless it says otherwise: a small model would add arguments for ever.
                "arguments": {"additionalProperties": False} | (tool.function.parameters or {"type": "object"}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class _Held:
    """The state of one answer; a `Constraint`."""

    def __init__(self, matcher: Grammar, engine: Engine, parts: Parts | None) -> None:
        self._matcher = matcher
        self._before = None if parts is None else parts.begins  # None: it is held to the grammar
        self._marks = {} if parts is None else parts.marks
        self._text, self._tail = engine.tokenizer.stream(), ""

    def allowed(self, logits: Floats) -> Floats:
        if self._before is not None:
            return logits
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        may = np.unpackbits(bits, bitorder="little", count=min(logits.size, 8 * bits.size)).astype(bool)
        if self._matcher.is_error() or not may.any():
            raise ModelError(f"the grammar came to no end: {_first_line(self._matcher.get_error())}")
        masked = np.full_like(logits, FORBIDDEN)
        masked[: may.size][may] = logits[: may.size][may]
        return masked

    def push(self, token: int) -> bool:
        if self._before is not None:
            self._tail = (self._tail + (self._marks.get(token) or self._text.push(token)))[-_HEAD:]
            if self._before.search(self._tail):
                self._before = None
            return False
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
