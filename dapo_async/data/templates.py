r"""What stands around a problem: DAPO's words, a request for \boxed{}, the tokenizer's chat template, or a text of the config."""

from __future__ import annotations

from types import MappingProxyType

from dapo_async.data.tokenizer import Tokenizer

PLACEHOLDER = "{problem}"
TEMPLATES = MappingProxyType(
    {
        # arXiv 2503.14476, Appendix A
        "dapo": (
            "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without quotes) "
            'where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".'
        ),
        # Qwen2.5-Math's words
        "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "chat": PLACEHOLDER,
    }
)
CHAT = "chat+"


class Template:
    """Made of a name (`dapo`, `boxed`, `chat`, `chat+dapo`, …) or of a text with {problem}; other braces in it are left alone."""

    def __init__(self, name: str, *, system: str | None = None) -> None:
        self._chat, self._system = name == "chat" or name.startswith(CHAT), system
        name = name.removeprefix(CHAT)
        self._text = TEMPLATES.get(name, name)
        assert PLACEHOLDER in self._text, name  # the config's rule
        self._before, _, self._after = self._text.partition(PLACEHOLDER)

    def around(self, problem: str) -> str:
        return self._text.replace(PLACEHOLDER, problem)

    def without(self, text: str) -> str:
        """The problem in a text that this template stands around; any other text as it is."""
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
        """The prompts as text and as token ids. A chat template brings its own special tokens. Raises ValueError where the tokenizer has none."""
        texts = [self.around(problem) for problem in problems]
        if not texts:
            return [], []
        if not self._chat:
            return texts, tokenizer(texts)["input_ids"]
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "data.template=chat needs a chat template, and the model's tokenizer has none; take an instruction-tuned model or another template"
            )
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        texts = [
            tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for text in texts
        ]
        return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]
