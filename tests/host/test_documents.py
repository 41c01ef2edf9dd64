"""Model card and bill of materials tell where the weights are from and under which licence."""

import json

import pytest

from host.recipe import parse_recipe
from host.stages.data import load_split
from host.stages.documents import ml_bom, model_card, spdx

RECIPE = """
name = "mine"
data = { source = "digits" }
model = { family = "cnn", variant = "small", options = { width = 8 } }
train = { epochs = 1 }
"""
START = {"source": "start.safetensors", "sha256": "ab" * 32, "licence": "cvnets-license"}
PROVENANCE = {
    "recipe_sha256": "12",
    "weights_sha256": "34",
    "data": "digits",
    "commit": "unknown",
    "packages": {"torch": "2.0"},
}


def write(provenance, licence):
    """The card, and the model of the bill of materials."""
    recipe = parse_recipe(RECIPE, where="test")
    card = model_card(recipe, load_split(recipe), [], None, provenance, licence)
    return card, json.loads(ml_bom(recipe, provenance, licence))["metadata"]["component"]


def test_a_model_trained_from_nothing_has_our_licence():
    card, model = write(PROVENANCE, "Apache-2.0")
    assert '- Options: {"width": 8}' in card
    assert "- Licence: Apache-2.0" in card
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert "pedigree" not in model


def test_a_model_that_started_from_published_weights_has_theirs():
    card, model = write(PROVENANCE | {"pretrained": START}, START["licence"])
    assert f"- Training started from start.safetensors, SHA-256 {START['sha256']}" in card
    assert "- Licence, that of the weights it started from: cvnets-license" in card
    (ancestor,) = model["pedigree"]["ancestors"]
    assert model["licenses"] == ancestor["licenses"] == [{"license": {"name": "cvnets-license"}}]
    assert (ancestor["name"], ancestor["hashes"][0]["content"]) == ("start.safetensors", START["sha256"])


@pytest.mark.parametrize(
    ("hub", "written"), [("apache-2.0", "Apache-2.0"), ("cc-by-nc-4.0", "CC-BY-NC-4.0"), ("our own", "our own")]
)
def test_licences_are_spelled_as_spdx_does(hub, written):
    assert spdx(hub) == written
