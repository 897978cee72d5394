"""Reasoning of models that think before they answer: what they write between two tags, as its own field."""

from typing import Any

from hbserve.server.chat.message_parts import MessageParts, TagSearch

Tags = tuple[str, str]
THINK: Tags = "<think>", "</think>"
SEED_THINK: Tags = "<seed:think>", "</seed:think>"


class ReasoningSplit:
    """Reader that separates an answer's reasoning from its other text, which `rest` reads."""

    def __init__(
        self,
        rest: MessageParts,
        *,
        has_begun: bool,
        is_shown: bool = True,
        end_id: int | None = None,
        tags: Tags = THINK,
    ) -> None:
        """Make a reader of one answer.

        has_begun: whether the prompt ends with <think>, as in some templates; the model does not repeat it then.
        end_id: the token that is </think>, if a single one is. tags: the two tags, for models that have others.
        """
        self._rest = rest
        self._begin_tag, self._end_tag = tags
        self._end_id = end_id
        self._num_undecided = 0
        """Number of tokens that are reasoning if the text so far is its beginning."""
        self._is_counted = False
        self._is_shown = is_shown
        self._search = TagSearch()
        self._state = "reasoning" if has_begun else "before"
        self._space = ""
        """White space that is left out if only a tag is on its other side."""
        self._is_empty = True
        """Whether only white space of this part has come."""

    def feed(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if self._state == "before":
            text = self._begin(text, final)
        if self._state == "reasoning":
            before, after = self._search.feed(text, self._end_tag, final=final)
            deltas += self._reasoning(before)
            if after is None:
                return deltas + (self._rest.feed("", final=True) if final else [])
            self._state, self._is_empty, text = "after", True, after
        if self._state == "after" and self._is_empty:
            text = text.lstrip()
            self._is_empty = not text
        if self._state != "before":
            deltas += self._rest.feed(text, final=final)
        return deltas

    def num_reasoning(self, token_ids: list[int]) -> int:
        """Return how many more tokens are now known to be reasoning: of these, whose text `feed` has just read, and of
        earlier ones. Tags are part of the reasoning."""
        if self._state == "before":
            self._num_undecided += len(token_ids)
        if self._state in ("before", "plain") or self._is_counted:
            return 0
        self._is_counted = self._state == "after"
        num_new = len(token_ids)
        if self._is_counted and self._end_id in token_ids:  # others may have come with it
            num_new = token_ids.index(self._end_id) + 1
        undecided, self._num_undecided = self._num_undecided, 0
        return undecided + num_new

    def _begin(self, text: str, final: bool) -> str:
        """Decide whether the answer begins with reasoning, and return the text that follows the decision."""
        self._space += text
        begun = self._space.lstrip()
        if begun.startswith(self._begin_tag):
            self._state, text, self._space = "reasoning", begun.removeprefix(self._begin_tag), ""
            return text
        if not final and self._begin_tag.startswith(begun):
            return ""
        self._state, text, self._space = "plain", self._space, ""
        return text

    def _reasoning(self, text: str) -> list[dict[str, Any]]:
        text = self._space + text
        if self._is_empty:
            text = text.lstrip()
        sure = text.rstrip()
        self._space = text[len(sure) :]
        self._is_empty = self._is_empty and not sure
        # Clients know it by the one name or by the other.
        return [{"reasoning_content": sure, "reasoning": sure}] if sure and self._is_shown else []

    def reason(self, reason: str | None) -> str | None:
        return self._rest.reason(reason)


def tags_of(chat_template: str | None) -> Tags | None:
    """Return the tags between which a chat template has its model think, or None if it does not."""
    return next((tags for tags in (SEED_THINK, THINK) if tags[1] in (chat_template or "")), None)


def end_token(tokenizer: Any, tags: Tags) -> int | None:
    """Return the token that ends reasoning, or None if several tokens do."""
    ids = tokenizer.encode(tags[1], add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def thinking_has_begun(tags: Tags, tokenizer: Any, prompt: tuple[int, ...]) -> bool:
    """Whether a prompt ends with the beginning of reasoning."""
    end: str = tokenizer.decode(prompt[-8:], skip_special_tokens=False)
    return end.rstrip().endswith(tags[0])
