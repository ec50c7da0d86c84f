"""The pack as ComfyUI loads it, and the example workflow through its executor."""

import asyncio
import json
import os
import shutil
import sys

import pytest

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import comfy.model_management
import execution
import folder_paths
import nodes as comfy_nodes
import tiny
import torch
from comfy_api.latest import io
from conftest import PACK
from tiny import Tiny

from dpt import v1
from dpt.nodes import NODES

WORKFLOW = PACK / "example_workflows" / "dpt_sd21.json"
EXTRAS = ("nodes_preview_any.py",)


def load_pack(path):
    """As ComfyUI does at start; the module that it made."""
    assert asyncio.run(comfy_nodes.load_custom_node(str(path)))
    return sys.modules[str(path).replace(".", "_x_")]


@pytest.fixture
def registry(comfyui, tmp_path, monkeypatch):
    """ComfyUI's nodes with the pack, which is linked into custom_nodes, and adapters in models/dpt."""
    models = tmp_path / "models"
    (models / "dpt").mkdir(parents=True)
    shutil.copy(Tiny("sd2").cases / "release_up1.safetensors", models / "dpt" / "dpt_sd21.safetensors")
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(comfy_nodes, "NODE_CLASS_MAPPINGS", dict(comfy_nodes.NODE_CLASS_MAPPINGS))
    monkeypatch.setattr(comfy_nodes, "NODE_DISPLAY_NAME_MAPPINGS", dict(comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS))
    for extra in EXTRAS:
        assert asyncio.run(comfy_nodes.load_custom_node(str(comfyui / "comfy_extras" / extra)))
    link = tmp_path / "custom_nodes" / "dpt-nodes"
    link.parent.mkdir()
    link.symlink_to(PACK)
    return link


def test_comfyui_finds_the_nodes_by_the_v3_schema(registry):
    module = load_pack(registry)
    assert not hasattr(module, "NODE_CLASS_MAPPINGS")
    for node in NODES:
        found = comfy_nodes.NODE_CLASS_MAPPINGS[node.id]
        assert issubclass(found, io.ComfyNode)
        assert comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS[node.id] == node.name
        found.VALIDATE_CLASS()


def test_comfyui_without_the_v3_schema_finds_the_same_nodes(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    module = load_pack(registry)
    assert not hasattr(module, "comfy_entrypoint")
    for node in NODES:
        found = comfy_nodes.NODE_CLASS_MAPPINGS[node.id]
        assert not issubclass(found, io.ComfyNode)
        assert comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS[node.id] == node.name


def test_both_definitions_say_the_same(registry):
    load_pack(registry)
    for node in NODES:
        new, old = comfy_nodes.NODE_CLASS_MAPPINGS[node.id], v1.node_class(node)
        info = new.GET_NODE_INFO_V1()
        assert info["input"]["required"].keys() == old.INPUT_TYPES()["required"].keys()
        for name, (kind, options) in old.INPUT_TYPES()["required"].items():
            new_kind, new_options = info["input"]["required"][name]
            if isinstance(kind, list):
                assert (new_kind, new_options["options"]) == ("COMBO", kind)
            else:
                assert new_kind == kind
            assert {key: new_options.get(key) for key in options} == options, name
        assert tuple(info["output"]) == old.RETURN_TYPES
        assert tuple(info["output_name"]) == old.RETURN_NAMES
        assert (info["category"], info["description"]) == (old.CATEGORY, old.DESCRIPTION)


def test_adapters_are_those_of_the_folder(registry, tmp_path):
    load_pack(registry)
    (tmp_path / "models" / "dpt" / "notes.txt").write_text("no adapter")
    (tmp_path / "models" / "dpt" / "other.bin").write_bytes(b"")
    loader = comfy_nodes.NODE_CLASS_MAPPINGS["DptLoader"]
    assert loader.INPUT_TYPES()["required"]["adapter"][1]["options"] == ["dpt_sd21.safetensors", "other.bin"]


def test_an_adapter_that_changed_is_loaded_again(registry, tmp_path):
    load_pack(registry)
    loader = comfy_nodes.NODE_CLASS_MAPPINGS["DptLoader"]
    before = loader.fingerprint_inputs(adapter="dpt_sd21.safetensors", heads=4)
    assert loader.fingerprint_inputs(adapter="dpt_sd21.safetensors", heads=4) == before
    with open(tmp_path / "models" / "dpt" / "dpt_sd21.safetensors", "ab") as file:
        file.write(b"\0")
    assert loader.fingerprint_inputs(adapter="dpt_sd21.safetensors", heads=4) != before


# The example workflow.


def api_prompt(workflow):
    """A workflow of the user interface as the executor takes it: inputs by name, from links and from widgets in their order."""
    links = {identity: (str(source), slot) for identity, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        linked = {entry["name"]: list(links[entry["link"]]) for entry in node["inputs"] if entry["link"] is not None}
        definition = comfy_nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        declared = {**definition.get("required", {}), **definition.get("optional", {})}
        widgets = list(node["widgets_values"])
        inputs = {}
        for name, (kind, *options) in declared.items():
            if name in linked:
                inputs[name] = linked.pop(name)
                continue
            assert isinstance(kind, list) or kind in ("FLOAT", "INT", "BOOLEAN", "STRING", "COMBO"), (
                node["type"],
                name,
            )
            inputs[name] = widgets.pop(0)
            if options and options[0].get("control_after_generate"):
                widgets.pop(0)
        assert not linked, f"{node['type']} has no inputs {sorted(linked)}"
        assert not widgets, f"{node['type']} has no widgets for {widgets}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


class TinyCheckpoint:
    """In place of ComfyUI's checkpoint loader."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": (["v2-1_512-ema-pruned.safetensors"],)}}

    def load(self, ckpt_name):
        model = Tiny("sd2")
        return model.patcher(), tiny.clip(model), TinyVae()


class TinyVae:
    def decode(self, samples):
        return torch.zeros(samples.shape[0], 8 * samples.shape[2], 8 * samples.shape[3], 3)


class Server:
    """What the executor tells of its progress."""

    client_id, last_node_id = None, None

    def __init__(self):
        self.events = []

    def send_sync(self, event, data, client_id=None):
        self.events.append((event, data))


def execute(prompt):
    """Runs a prompt as ComfyUI's worker does; outputs of its nodes by number."""
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    assert valid, (error, errors)
    executor = execution.PromptExecutor(Server())
    executor.execute(prompt, "test", {}, outputs)
    failures = [data for event, data in executor.status_messages if event == "execution_error"]
    assert executor.success, failures
    return executor.history_result["outputs"]


@pytest.mark.parametrize("schema", ["v3", "v1"])
@pytest.mark.parametrize("gradient", ["weights", "host"])
def test_the_example_workflow_runs(registry, tmp_path, monkeypatch, library, schema, gradient):
    if schema == "v1":
        monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    load_pack(registry)
    comfy_nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"] = TinyCheckpoint
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    prompt = api_prompt(json.loads(WORKFLOW.read_text()))
    by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
    by_type["EmptyLatentImage"].update(width=128, height=128, batch_size=2)
    by_type["KSampler"].update(steps=3)
    # The tiny adapter's sizes.
    by_type["DptLoader"].update(gradient=gradient, heads=4, matching_queries=5)
    outputs = execute(prompt)
    report = json.loads(outputs["12"]["text"][0])
    assert [record["outcome"] for record in report["records"]] == ["corrected"] * 3
    assert [len(record["items"]) for record in report["records"]] == [2] * 3
    assert len(list((tmp_path / "output").glob("dpt_*.png"))) == 2
    [plot] = outputs["11"]["images"]
    assert (tmp_path / "temp" / plot["filename"]).stat().st_size > 1000
    comfy.model_management.unload_all_models()
