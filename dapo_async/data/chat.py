"""The chat template of a model folder: a problem comes in, the text of a conversation leaves.

The template is a program in the model folder. transformers runs it in a sandbox, which bounds
neither its time nor its memory. `check_chat_template` therefore tries it in a child process before
a run starts. `templates.py` calls `render`.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dapo_async.data.conversation import SYSTEM, USER, Turn
from dapo_async.data.tokenizer import Tokenizer

BOM = "\ufeff"
PROBLEM = "What is 2 + 3?"
TRIAL_S = 10.0
NUM_TRIALS = 8  # a template that chooses one of two texts at random differs in 99 % of the cases
TRIAL_BYTES = 2**31  # beyond what the process has already
MAX_CHARACTERS = 1_000_000  # a longer text would not fit any model
NAMED = "additional_chat_templates"
OTHER = "correct the template, or use another one (data.template=boxed)"
# Some templates write today's date. A run must find the same prompts when it is resumed on another
# day, so they get the date that Llama 3's template has where it knows none.
DATE = datetime(2024, 7, 26)


def render(tokenizer: Tokenizer, problem: str, *, system: str | None) -> str:
    """The conversation up to the assistant's turn.

    Raises ValueError, in one line, when the template raises or leaves out the problem.
    """
    try:
        text = _render(tokenizer, problem, system)
    except Exception as error:  # a template may raise anything
        raise ValueError(_raised(tokenizer, error, problem=problem, system=system)) from error
    if not isinstance(text, str) or problem.strip() not in text:
        raise ValueError(
            f"{_origin(tokenizer)} leaves out the user's turn (of the problem {problem[:60]!r} it "
            f"makes {str(text)[:60]!r}); {OTHER}"
        )
    return text


def render_turns(tokenizer: Tokenizer, turns: Sequence[Turn]) -> str:
    """The conversation of these turns up to the assistant's next turn.

    Raises ValueError, in one line and without a remedy, when the template raises or leaves out a
    turn of the system or the user.
    """
    try:
        text = _apply(tokenizer, turns)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"{_origin(tokenizer)} fails: {_reason(error)}") from error
    for turn in turns:
        if turn.role in (SYSTEM, USER) and turn.content.strip() not in str(text):
            raise ValueError(
                f"{_origin(tokenizer)} leaves out the {turn.role} turn {turn.content[:60]!r}"
            )
    return text


def _render(tokenizer: Tokenizer, problem: str, system: str | None) -> str:
    first = [] if system is None else [Turn(SYSTEM, system)]
    return _apply(tokenizer, [*first, Turn(USER, problem)])


def _apply(tokenizer: Tokenizer, turns: Sequence[Turn]) -> str:
    return tokenizer.apply_chat_template(
        [turn._asdict() for turn in turns],
        tokenize=False,
        add_generation_prompt=True,
        strftime_now=DATE.strftime,
    )


def _raised(tokenizer: Tokenizer, error: Exception, *, problem: str, system: str | None) -> str:
    remedy = OTHER
    if system is not None:
        try:
            _render(tokenizer, problem, None)
            remedy = "without a system turn it works: set data.system=null"
        except Exception:  # noqa: BLE001 (the first error says it)
            remedy = OTHER
    return f"{_origin(tokenizer)} fails: {_reason(error)}; {remedy}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def needs_chat_template(tokenizer: Tokenizer) -> None:
    """Raises ValueError when the tokenizer has no chat template that a conversation can use."""
    templates = getattr(tokenizer, "chat_template", None)
    if not has_chat_template(tokenizer):
        raise ValueError(
            "data.template=chat needs a chat template, but the model's tokenizer has none; "
            "use an instruction-tuned model or another template"
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise ValueError(
            f"{_origin(tokenizer)} has no template named default (it has {', '.join(templates)}); "
            "copy chat_template.jinja of the base model into the folder, or use another template "
            "(data.template=boxed)"
        )


def check_chat_template(
    tokenizer: Tokenizer, *, system: str | None, stop_token_ids: Sequence[int]
) -> None:
    """Tries the chat template on a short problem.

    Raises ValueError, in one line, for a template that fails, does not end, fills the memory,
    renders too much or another text each time, leaves out a turn, doubles the token at the begin of
    the text, or ends with a stop token.
    """
    needs_chat_template(tokenizer)
    origin = _origin(tokenizer)
    outcome = _trial(tokenizer, system)
    if outcome is None and system is not None and _trial(tokenizer, None) is not None:
        raise ValueError(
            f"{origin} did not end within {TRIAL_S:g} s; without a system turn it works: "
            "set data.system=null"
        )
    if outcome is None:
        raise ValueError(
            f"{origin} did not end within {TRIAL_S:g} s and {TRIAL_BYTES / 2**30:g} GiB; {OTHER}"
        )
    first, is_constant, length = outcome
    if length > MAX_CHARACTERS:
        raise ValueError(
            f"{origin} makes {length} characters of a problem of {len(PROBLEM)}; {OTHER}"
        )
    if first is None:  # it raised: here it raises again, and the error gets its remedy
        render(tokenizer, PROBLEM, system=system)
        return
    if not is_constant:
        raise ValueError(
            f"{origin} makes another text each time, so a run could not be resumed; {OTHER}"
        )
    text = render(tokenizer, PROBLEM, system=system)
    if text.startswith(BOM):
        raise ValueError(
            f"{origin} begins with a byte order mark, which would be in every prompt; save the "
            "file as UTF-8 without it"
        )
    if system is not None and system.strip() not in text:
        raise ValueError(f"{origin} leaves out the system turn; set data.system=null")
    _check_special_tokens(tokenizer, text, stop_token_ids)


def _check_special_tokens(tokenizer: Tokenizer, text: str, stop_token_ids: Sequence[int]) -> None:
    origin = _origin(tokenizer)
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    bos = tokenizer.bos_token_id
    # The text counts too: some tokenizers read an unknown character as one of these tokens.
    if bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.decode([bos])):
        raise ValueError(
            f"{origin} writes {tokenizer.decode([bos])!r} twice at the begin of the text; {OTHER}"
        )
    last = tokenizer([text.rstrip()], add_special_tokens=False)["input_ids"][0][-1:]
    is_stop = bool(last) and last[0] in {*stop_token_ids} - {bos}
    if is_stop and text.rstrip().endswith(tokenizer.decode(last)) and _is_special(tokenizer, *last):
        raise ValueError(
            f"{origin} ends the prompt with the stop token {tokenizer.decode(last)!r}, so the "
            f"model has no turn to answer in; {OTHER}"
        )


def _is_special(tokenizer: Tokenizer, token_id: int) -> bool:
    token = getattr(tokenizer, "added_tokens_decoder", {}).get(token_id)
    return bool(getattr(token, "special", False))


def _origin(tokenizer: Tokenizer) -> str:
    """The template's name for messages, with its file."""
    folder = Path(str(getattr(tokenizer, "name_or_path", "")))
    templates = getattr(tokenizer, "chat_template", None)
    is_named = isinstance(templates, dict) and "default" not in templates
    if is_named and (folder / NAMED).is_dir():
        # With these files transformers does not read the template of tokenizer_config.json.
        return f"the chat template in {folder / NAMED}"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).is_file():
            return f"the chat template in {folder / name}"
    return "the chat template of the model's tokenizer"


def _trial(tokenizer: Tokenizer, system: str | None) -> tuple[str | None, bool, int] | None:
    """A rendering, whether further ones are equal, and its length, from a child process.

    (None, True, 0): it raised. None: the child did not end in time, or died.
    """
    context = multiprocessing.get_context("fork")  # the tokenizer needs no copy
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_try, args=(tokenizer, system, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(TRIAL_S):
            return None
        outcome: tuple[str | None, bool, int] = receiver.recv()
        return outcome
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()
        receiver.close()


def _try(tokenizer: Tokenizer, system: str | None, sender: Connection) -> None:
    _limit_memory()
    outcome: Any
    try:
        first, *others = (_render(tokenizer, PROBLEM, system) for _ in range(NUM_TRIALS))
        outcome = (first[:MAX_CHARACTERS], {*others} == {first}, len(first))
    except MemoryError:
        return  # as one that does not end
    except BaseException:  # noqa: BLE001 (the parent renders again and reports it)
        outcome = (None, True, 0)
    sender.send(outcome)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + TRIAL_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
