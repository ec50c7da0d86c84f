"""Node classes of ComfyUI's V3 schema."""

from comfy_api.latest import ComfyExtension, io

from .fields import Field, Node

_TYPES = {"FLOAT": io.Float, "INT": io.Int, "BOOLEAN": io.Boolean, "STRING": io.String}


def node_class(node: Node) -> type[io.ComfyNode]:
    """The class for a `ComfyExtension`."""

    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=node.id,
            display_name=node.name,
            category=node.category,
            description=node.description,
            inputs=[_input(entry) for entry in node.inputs],
            outputs=[_type(kind).Output(display_name=name) for kind, name in node.outputs],
        )

    def execute(cls, **inputs) -> io.NodeOutput:
        return io.NodeOutput(*node.run(**inputs))

    members = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    fingerprint = node.fingerprint
    if fingerprint is not None:
        members["fingerprint_inputs"] = classmethod(lambda cls, **inputs: fingerprint(**inputs))
    return type(node.id, (io.ComfyNode,), members)


def extension(nodes: list[Node]) -> ComfyExtension:
    """The extension that `comfy_entrypoint` returns."""
    classes = [node_class(node) for node in nodes]

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return classes

    return Extension()


def _type(kind: str) -> type:
    return _TYPES.get(kind) or io.Custom(kind)


def _input(entry: Field) -> io.Input:
    if entry.choices is not None:
        return io.Combo.Input(entry.name, options=entry.choices(), tooltip=entry.tooltip, **entry.options)
    return _type(entry.type).Input(entry.name, tooltip=entry.tooltip, **entry.options)
