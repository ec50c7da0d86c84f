"""The pack's files fit together; without ComfyUI."""

import json

import tomllib
from conftest import PACK

from dpt import v1
from dpt.nodes import NODES

OWN = {node.id: node for node in NODES}
WIDGETS = {"COMBO", "FLOAT", "INT", "BOOLEAN", "STRING"}


def test_the_registrys_metadata():
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == (PACK / "requirements.txt").read_text().split()
    assert project["tool"]["comfy"]["DisplayName"]
    assert (PACK / project["project"]["readme"]).is_file()


def test_nodes_take_and_give_what_they_declare():
    for node in NODES:
        run = node.run.__code__
        assert tuple(entry.name for entry in node.inputs) == run.co_varnames[: run.co_argcount], node.id


def test_defaults_are_within_their_ranges():
    for node in NODES:
        for entry in node.inputs:
            default = entry.options.get("default")
            if entry.type in ("FLOAT", "INT"):
                assert entry.options["min"] <= default <= entry.options["max"], entry.name
            if entry.choices is not None and entry.name != "adapter":
                assert default in entry.choices(), entry.name


def test_the_old_definition():
    node = OWN["DptTextEncode"]
    found = v1.node_class(node)
    text = found.INPUT_TYPES()["required"]["text"]
    assert text == ("STRING", {"default": "", "multiline": True, "dynamicPrompts": True, "tooltip": "the prompt"})
    assert (found.RETURN_TYPES, found.FUNCTION, found.CATEGORY) == (("CONDITIONING",), "run", "DPT")
    assert getattr(v1.node_class(OWN["DptLoader"]), "IS_CHANGED", None) is not None
    assert not hasattr(found, "IS_CHANGED")


def test_workflows_fit_the_nodes():
    workflows = list((PACK / "example_workflows").glob("*.json"))
    assert workflows
    for path in workflows:
        workflow = json.loads(path.read_text())
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for identity, source, slot, target, place, kind in workflow["links"]:
            output, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
            assert identity in output["links"]
            assert taken["link"] == identity
            assert output["type"] == kind
        for node in (node for node in workflow["nodes"] if node["type"] in OWN):
            declared = OWN[node["type"]]
            widgets = [entry for entry in declared.inputs if entry.type in WIDGETS]
            assert len(widgets) == len(node["widgets_values"]), node["type"]
            for entry, value in zip(widgets, node["widgets_values"], strict=True):
                if entry.type in ("FLOAT", "INT"):
                    assert entry.options["min"] <= value <= entry.options["max"], entry.name
                elif entry.choices is not None and entry.name != "adapter":
                    assert value in entry.choices(), entry.name
            assert [(entry["name"], entry["type"]) for entry in node["inputs"]] == [
                (entry.name, entry.type) for entry in declared.inputs if entry.type not in WIDGETS
            ]
            assert [(entry["type"], entry["name"]) for entry in node["outputs"]] == list(declared.outputs)
