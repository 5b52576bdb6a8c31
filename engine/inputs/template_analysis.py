"""What a chat template's syntax tree tells about the messages that it expects."""

from __future__ import annotations

from jinja2 import nodes


def iterates_over_content(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's ``content``, and so wants a list of parts there.

    Content is followed through filters, slices, assignments and macro arguments, but not through method
    calls: ``content.split(...)`` is a string's.
    """
    aliases = _content_names(tree)
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, aliases: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name not in ("string", "trim", "tojson") and (
            node.node is not None and _is_content(node.node, aliases)
        )
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node, aliases)
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.CondExpr):
        branches = [branch for branch in (node.expr1, node.expr2) if branch is not None]
        return any(_is_content(branch, aliases) for branch in branches)
    return isinstance(node, nodes.Name) and node.name in aliases


def _content_names(tree: nodes.Template) -> set[str]:
    """Names that stand for a message's content somewhere in the template."""
    aliases: set[str] = set()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    while True:
        found = {
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, aliases)
        }
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                pairs = zip(macro.args, call.args, strict=False)
                found |= {name.name for name, value in pairs if _is_content(value, aliases)}
        if found <= aliases:
            return aliases
        aliases |= found
