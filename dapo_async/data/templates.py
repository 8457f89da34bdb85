r"""The text around a problem: a problem comes in, the text of a prompt leaves.

`prompts.py` calls it. A template is DAPO's prompt, a request for \boxed{}, the tokenizer's chat
template, or the user's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from dapo_async.data.chat import needs_chat_template, render, render_turns
from dapo_async.data.conversation import SYSTEM, USER, Turn
from dapo_async.data.tokenizer import Tokenizer

PLACEHOLDER = "{problem}"
TEMPLATES = MappingProxyType(
    {
        # arXiv 2503.14476, Appendix A
        "dapo": (
            "Solve the following math problem step by step. The last line of your response should "
            "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
            "problem.\n\n{problem}\n\n"
            'Remember to put your answer on its own line after "Answer:".'
        ),
        # the prompt of Qwen2.5-Math
        "boxed": (
            "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
        ),
        "chat": PLACEHOLDER,
    }
)
CHAT = "chat+"


class TurnsError(Exception):
    """The chat template can't hold the turns before the problem with this index."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Template:
    """A template by name (`dapo`, `boxed`, `chat`, `chat+dapo`, …) or a text with {problem}.

    Other braces in the text stay as they are.
    """

    def __init__(self, name: str, *, system: str | None = None) -> None:
        self.is_chat, self._system = name == "chat" or name.startswith(CHAT), system
        name = name.removeprefix(CHAT)
        self._text = TEMPLATES.get(name, name)
        assert PLACEHOLDER in self._text, name  # the config has checked it
        self._before, _, self._after = self._text.partition(PLACEHOLDER)

    @property
    def before(self) -> str | None:
        """The text before the problem; None where the tokenizer's chat template is used."""
        return None if self.is_chat else self._before

    def around(self, problem: str) -> str:
        """The problem within the template, without the chat template."""
        return self._text.replace(PLACEHOLDER, problem)

    def without(self, text: str) -> str:
        """The problem in a text that has this template; any other text unchanged."""
        around = len(self._before) + len(self._after)
        if (
            len(text) < around
            or not text.startswith(self._before)
            or not text.endswith(self._after)
        ):
            return text
        return text[len(self._before) : len(text) - len(self._after)]

    def tokenised(
        self,
        problems: Sequence[str],
        tokenizer: Tokenizer,
        *,
        contexts: Sequence[Sequence[Turn]] | None = None,
    ) -> tuple[list[str], list[list[int]]]:
        """The prompts as texts and as token ids.

        A chat template adds its own special tokens. It holds the turns before each problem, its
        context, too; a system turn among them replaces the system text. Raises ValueError when the
        tokenizer has no chat template, and when it fails; `TurnsError` when it fails for a context.
        """
        texts = [self.around(problem) for problem in problems]
        if not texts:
            return [], []
        if not self.is_chat:
            assert not any(contexts or ()), "the caller has refused turns without a chat template"
            return texts, tokenizer(texts)["input_ids"]
        needs_chat_template(tokenizer)
        for index, text in enumerate(texts):
            context = contexts[index] if contexts else ()
            texts[index] = (
                self._with_context(index, context, text, tokenizer)
                if context
                else render(tokenizer, text, system=self._system)
            )
        return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _with_context(
        self, index: int, context: Sequence[Turn], text: str, tokenizer: Tokenizer
    ) -> str:
        turns = [*context, Turn(USER, text)]
        if self._system is not None and all(turn.role != SYSTEM for turn in turns):
            turns.insert(0, Turn(SYSTEM, self._system))
        try:
            return render_turns(tokenizer, turns)
        except ValueError as error:
            raise TurnsError(index, str(error)) from error
