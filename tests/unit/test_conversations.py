"""Tokens that are recorded against the chat template's rendering of the whole conversation, for five families of models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hybridflow.environments.base import Message
from hybridflow.environments.template import TemplateError, TemplateTokens
from hybridflow.environments.tools import format_of, message_of
from tests.toy import make_tiny_tokenizer
from tests.unit.chat_templates import FAMILIES, tokenizer_of

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALLS = {
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 40, "b": 2}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 40, "b": 2}}\n</tool_call>',
    "llama3": '{"name": "add", "parameters": {"a": 40, "b": 2}}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 40, "b": 2}}]',
}
"""What each family's model says to call a tool."""
LEADING = {"mistral": " "}
"""What the template writes between the start of a turn and its content: there the model says it itself."""


class Recorded:
    """A conversation as an episode records it: what is sampled is kept, what is appended is tokenised."""

    def __init__(self, family: str, messages: Sequence[Message], tools: Sequence[dict[str, object]] = ()):
        self.tokenizer = tokenizer_of(family)
        self.conversations, self.said, self.tools = TemplateTokens(self.tokenizer), list(messages), tools
        _, self.tokens = self.conversations.opening(messages, tools)
        self.num_encoded = len(self.tokens)
        self.end = FAMILIES[family][1]

    def says(self, text: str, message: Message | None = None) -> None:
        """The policy samples these words and the end of its turn."""
        self.turn = self.tokenizer.encode(text + self.end, add_special_tokens=False)
        self.tokens += self.turn
        self.said.append(message or {"role": "assistant", "content": text.strip()})

    def hears(self, *messages: Message) -> None:
        added = self.conversations.appended(self.said, messages, self.tools, behind=self.turn)
        self.tokens += added
        self.num_encoded += len(added)
        self.said += messages

    def rendered(self) -> list[int]:
        """The whole conversation, written and tokenised at once."""
        return self.conversations.opening(self.said, self.tools)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_tokens_are_those_of_the_whole_conversation(family: str) -> None:
    recorded = Recorded(family, [{"role": "user", "content": "I think of a number. Guess it in three turns."}])
    lead = LEADING.get(family, "")
    for guess, hint in (("5", "higher than that"), ("42\n\nor so", "lower"), ("the winner", "over there")):
        recorded.says(lead + guess, {"role": "assistant", "content": guess})
        recorded.hears({"role": "user", "content": hint})
    assert recorded.tokens == recorded.rendered()


@pytest.mark.parametrize("family", CALLS)
def test_with_tools_too(family: str) -> None:
    recorded = Recorded(family, [{"role": "user", "content": "What is 40 + 2?"}], [TOOL])
    message = message_of(CALLS[family], format_of("auto", recorded.tokenizer.chat_template))
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 40, "b": 2}}  # type: ignore[index]
    recorded.says(CALLS[family], message)
    recorded.hears({"role": "tool", "name": "add", "content": "42"})
    assert recorded.tokens == recorded.rendered()
    recorded.says(LEADING.get(family, "") + "It is 42.", {"role": "assistant", "content": "It is 42."})
    recorded.hears({"role": "user", "content": "Thanks."})
    rendered = recorded.rendered()
    if family != "mistral":
        assert recorded.tokens == rendered
    else:  # by design: Mistral moves the list of tools to the last question; what was sampled had read it before the first
        moved = recorded.tokenizer.decode(rendered)
        assert moved.index("[AVAILABLE_TOOLS]") > moved.index("40 + 2")
        kept = recorded.tokenizer.decode(recorded.tokens)
        assert kept.index("[AVAILABLE_TOOLS]") < kept.index("40 + 2")
        assert kept[kept.index("[/AVAILABLE_TOOLS]") :].split("[INST]")[1:] == [
            part.partition("[/AVAILABLE_TOOLS]")[2] or part for part in moved.split("[INST]")[1:]
        ]


def test_thoughts_that_qwen3_leaves_out_of_history_stay_where_they_were_sampled() -> None:
    recorded = Recorded("qwen3", [{"role": "user", "content": "Guess."}])
    recorded.says("<think>\nthe middle\n</think>\n\n50")
    recorded.hears({"role": "user", "content": "higher"})
    kept, rendered = (recorded.tokenizer.decode(tokens) for tokens in (recorded.tokens, recorded.rendered()))
    assert kept.replace("<think>\nthe middle\n</think>\n\n", "") == rendered
    assert len(kept) > len(rendered)


def test_thoughts_before_the_answer_of_a_tool_stay_in_both() -> None:
    recorded = Recorded("qwen3", [{"role": "user", "content": "What is 40 + 2?"}], [TOOL])
    said = "<think>\nadd them\n</think>\n" + CALLS["qwen3"]
    recorded.says(said, message_of(said, format_of("auto", recorded.tokenizer.chat_template)))
    recorded.hears({"role": "tool", "content": "42"}, {"role": "tool", "content": "and 43"})
    assert recorded.tokens == recorded.rendered()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_that_was_cut_gets_the_end_that_was_not_sampled(family: str) -> None:
    recorded = Recorded(family, [{"role": "user", "content": "Guess."}])
    recorded.end = ""
    recorded.says(LEADING.get(family, "") + "the", {"role": "assistant", "content": "the"})
    recorded.hears({"role": "user", "content": "Finish your sentence."})
    assert recorded.tokens == recorded.rendered()


def test_a_history_that_the_template_refuses_is_no_obstacle_to_what_is_appended() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    recorded = Recorded("mistral", [{"role": "user", "content": "Two turns of mine."}])
    recorded.said += said[1:]  # after which another turn of the policy breaks the order of roles
    recorded.says(" c")
    recorded.hears({"role": "tool", "content": "d"})
    assert recorded.tokenizer.decode(recorded.tokens).endswith('c</s>[TOOL_RESULTS] {"content": "d"}[/TOOL_RESULTS]')


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(TemplateError, match=r"refuses messages of the roles assistant: roles must alternate"):
        Recorded("mistral", [{"role": "assistant", "content": "I begin."}])


def test_without_a_template_messages_follow_each_other() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    conversations = TemplateTokens(tokenizer)
    text, tokens = conversations.opening([{"role": "user", "content": "1+1="}])
    assert (text, tokens) == ("1+1=", tokenizer.encode("1+1="))
    said = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "3"}]
    assert conversations.appended(said, [{"role": "user", "content": " no"}], behind=[7]) == tokenizer.encode(" no")


def test_schemas_of_an_episode_go_before_those_of_the_configuration() -> None:
    asked = [{"role": "user", "content": "40 + 2?"}]
    add, other = ({"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "other"))
    conversations = TemplateTokens(tokenizer_of("qwen3"), options={"tools": [other]})
    assert "other" in conversations.opening(asked)[0]
    text, _ = conversations.opening(asked, [add])
    assert '"add"' in text and "other" not in text
