"""Which values of a traced graph share memory, and which ops in place may therefore not become ops out of place."""

from torch import fx, nn

from fxfeedback.errors import RuleError
from fxfeedback.graph.effects import has_twin
from fxfeedback.graph.nodes import name_of, user_line

VIEWS = {
    "getitem", "view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "t", "squeeze",
    "unsqueeze", "select", "narrow", "expand", "chunk", "split", "unbind", "contiguous", "dropout", "detach",
}  # fmt: skip
VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def is_view(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node of a traced graph makes a view of its first argument, or may make one."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), VIEW_MODULES)
    if node.target is getattr:
        return node.args[1] == "data"
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in VIEWS


class Memory:
    """Whose memory every node's value lies in, or may lie in: what it is a view of."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.owner: dict[fx.Node, fx.Node] = {}
        self.sharing: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            first = node.args[0] if node.args else None
            shares = isinstance(first, fx.Node) and (is_view(node, root) or has_twin(node, root))
            self.owner[node] = self.owner[first] if shares else node  # type: ignore[index]
            self.sharing.setdefault(self.owner[node], []).append(node)

    def check_overwriting(self, node: fx.Node) -> None:
        """Refuse an in-place op that changes memory which is read later under another name: as a view, or by a view."""
        owner = self.owner[node.args[0]]  # type: ignore[index]
        if owner.op == "get_attr":
            raise RuleError(
                f"the in-place op at node {name_of(node)!r}{user_line(node)} writes into {owner.target!r} through "
                "a view of it: write into the whole, as by copy_, under torch.no_grad()"
            )
        for other in self.sharing[self.owner[node.args[0]]]:  # type: ignore[index]
            came_before = self.order[other] < self.order[node] and other is not node.args[0]
            if came_before and any(self.order[user] > self.order[node] for user in other.users):
                raise RuleError(
                    f"the in-place op at node {name_of(node)!r}{user_line(node)} overwrites memory that is read "
                    f"again as {name_of(other)!r}: write it out of place (x = x + y, not x.add_(y))"
                )
