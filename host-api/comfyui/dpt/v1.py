"""Node classes as every version of ComfyUI knows them."""

from .fields import Field, Node

_NAMES = {"dynamic_prompts": "dynamicPrompts"}


def node_class(node: Node) -> type:
    """The class for `NODE_CLASS_MAPPINGS`."""

    def input_types(cls) -> dict:
        return {"required": {entry.name: _input(entry) for entry in node.inputs}}

    def run(self, **inputs) -> tuple:
        return node.run(**inputs)

    members = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": node.category,
        "DESCRIPTION": node.description,
        "run": run,
    }
    fingerprint = node.fingerprint
    if fingerprint is not None:
        members["IS_CHANGED"] = classmethod(lambda cls, **inputs: fingerprint(**inputs))
    return type(node.id, (), members)


def _input(entry: Field) -> tuple:
    options = {_NAMES.get(name, name): value for name, value in entry.options.items()}
    options["tooltip"] = entry.tooltip
    return (entry.type if entry.choices is None else entry.choices(), options)
