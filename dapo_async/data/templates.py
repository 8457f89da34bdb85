r"""The text around a problem: a problem comes in, the text of a prompt leaves.

`prompts.py` calls it. A template is DAPO's prompt, a request for \boxed{}, the tokenizer's chat
template, or the user's text.
"""

from __future__ import annotations

from types import MappingProxyType

from dapo_async.data.chat import needs_chat_template, render
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


class Template:
    """A template by name (`dapo`, `boxed`, `chat`, `chat+dapo`, …) or a text with {problem}.

    Other braces in the text stay as they are.
    """

    def __init__(self, name: str, *, system: str | None = None) -> None:
        self._chat, self._system = name == "chat" or name.startswith(CHAT), system
        name = name.removeprefix(CHAT)
        self._text = TEMPLATES.get(name, name)
        assert PLACEHOLDER in self._text, name  # the config has checked it
        self._before, _, self._after = self._text.partition(PLACEHOLDER)

    @property
    def before(self) -> str | None:
        """The text before the problem; None where the tokenizer's chat template is used."""
        return None if self._chat else self._before

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
        self, problems: list[str], tokenizer: Tokenizer
    ) -> tuple[list[str], list[list[int]]]:
        """The prompts as texts and as token ids.

        A chat template adds its own special tokens. Raises ValueError when the tokenizer has none,
        and when it fails.
        """
        texts = [self.around(problem) for problem in problems]
        if not texts:
            return [], []
        if not self._chat:
            return texts, tokenizer(texts)["input_ids"]
        needs_chat_template(tokenizer)
        texts = [render(tokenizer, text, system=self._system) for text in texts]
        return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]
