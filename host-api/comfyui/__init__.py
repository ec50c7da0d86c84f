"""DPT for ComfyUI: corrects latents while they are sampled, so that the picture follows the prompt."""

from .dpt import v1
from .dpt.nodes import NODES, register_folder

register_folder()

try:
    from .dpt import v3
except ImportError:  # a ComfyUI without the V3 schema
    NODE_CLASS_MAPPINGS = {node.id: v1.node_class(node) for node in NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.name for node in NODES}
else:

    async def comfy_entrypoint():
        """Where ComfyUI finds the nodes."""
        return v3.extension(NODES)
