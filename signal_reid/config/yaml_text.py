"""Reads YAML as a configuration needs it: plain values in a bounded tree, each key once."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from signal_reid.runtime.text import shortened

LONGEST = 1 << 20
"""Bytes of a file; the longest configuration that we publish has 1,000."""
_MOST_NODES = 20_000
_DEEPEST = 20
_LONGEST_NUMBER = 100


class YamlError(ValueError):
    """Text that is not the YAML of a configuration; the message is one line without the name of the file."""


def read_yaml(content: str | bytes) -> Any:
    """What a YAML document says.

    Args:
        content: text, or bytes in UTF-8 whatever the locale.

    Raises:
        YamlError: no YAML, or YAML that no configuration needs: a key that stands twice, a cycle, more than 20,000
            values with every alias counted as what it stands for, more than 20 levels.
    """
    if len(content) > LONGEST:
        raise YamlError(f"longer than any configuration ({len(content)} bytes, at most {LONGEST})")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        raise YamlError("not a text file in UTF-8") from None
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1} " if where is not None else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise YamlError(f"{line}is not valid YAML: {shortened(problem)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # a tag on what it does not fit
        raise YamlError(f"is not valid YAML: {shortened(' '.join(str(error).split()))}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with budgets; an alias counts as what it stands for, so that a merge costs no more."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}
        """Nodes below each finished node, itself included."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        before, mark = self._nodes, self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {_DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias of what it stands in", mark)
        self._nodes += self._sizes[id(node)] if is_alias else 1
        if self._nodes > _MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_NODES} values", mark)
        if not is_alias:
            self._sizes[id(node)] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    problem = f"the key {shortened(key.value)} stands twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node

    def construct_scalar(self, node: ScalarNode | MappingNode) -> Any:
        numeric = node.tag.endswith((":int", ":float"))
        if numeric and len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        return super().construct_scalar(node)
