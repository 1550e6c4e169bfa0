"""Merges that a recipe describes: files, names of models, numbers, and what is refused."""

import json
import sys

import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextClassifier
from qwen3_next.transfer.merge.dare import merge_dare
from qwen3_next.transfer.merge.karcher import merge_karcher
from qwen3_next.transfer.merge.merge_config import METHODS, merge_from_config
from qwen3_next.transfer.merge.merge_recipes import read_recipe
from qwen3_next.transfer.merge.slerp import merge_slerp
from qwen3_next.transfer.merge.task_arithmetic import merge_linear, merge_task_arithmetic
from qwen3_next.transfer.merge.ties import merge_ties
from tests.support.merge_models import IDS, base, bits_of, changed, refused, with_noise
from tests.support.small_models import logits_once, small

LOADED = {"base": 0, "coder": 1, "poet": 2}
DENSE = {
    "num_experts": 0,
    "num_layers": 1,
    "layer_types": ("full_attention",),
    "mlp_only_layers": (),
}


def loaded(*names):
    return {name: changed(LOADED[name]) if name != "base" else base() for name in names}


def recipe(method, *entries, **others):
    """`entries` are the parameters of coder and poet."""
    models = [{"model": n, "parameters": p} for n, p in zip(("coder", "poet"), entries)]
    return {"merge_method": method, "models": models, **others}


def run(given, *names):
    return bits_of(merge_from_config(given, models=loaded(*names)))


def test_linear():
    given = recipe("linear", {"weight": 1}, {"weight": 3}, parameters={"normalize": False})
    expected = merge_linear([changed(1), changed(2)], [1, 3], normalize=False)
    assert run(given, "coder", "poet") == bits_of(expected)


def test_karcher():
    given = recipe("karcher", {"weight": 1}, {}, parameters={"weight": 3})
    expected = merge_karcher([changed(1), changed(2)], [1, 3])
    assert run(given, "coder", "poet") == bits_of(expected)


def test_slerp_begins_with_the_base():
    filters = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "mlp", "value": 0.2},  # experts too: it is a piece of their path
        {"value": 0.7},
    ]
    t = {"self_attn": [0, 1], "/mlp/": 0.2, "*": 0.7}
    there = recipe("slerp", {}, {}, parameters={"t": filters})
    expected = bits_of(merge_slerp(changed(1), changed(2), t))
    assert run(there, "coder", "poet") == expected
    assert run({**there, "base_model": "coder"}, "coder", "poet") == expected
    back = bits_of(merge_slerp(changed(2), changed(1), t))
    assert run({**there, "base_model": "poet"}, "coder", "poet") == back


def test_task_arithmetic():
    given = recipe(
        "task_arithmetic",
        {"weight": {"router": 0.1, "*": 1}},
        {"weight": [0.2, 0.4]},
        base_model="base",
        parameters={"lambda": 0.5, "normalize": True},
    )
    expected = merge_task_arithmetic(
        base(),
        [changed(1), changed(2)],
        [{"router": 0.1, "*": 1}, [0.2, 0.4]],
        normalize=True,
        scale=0.5,
    )
    assert run(given, *LOADED) == bits_of(expected)


def test_ties_with_the_base_among_the_models():
    given = recipe(
        "ties",
        {"density": 0.5, "weight": 2},
        {"density": [0.1, 0.9]},
        base_model="base",
        parameters={"weight": 1.0, "density": 0.3, "normalize": False, "lambda": 0.9},
    )
    given["models"].append({"model": "base"})
    expected = merge_ties(base(), [changed(1), changed(2)], [2, 1.0], [0.5, [0.1, 0.9]], False, 0.9)
    assert run(given, *LOADED) == bits_of(expected)


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare(combine):
    shared = {"density": 0.4, "rescale": False, "seed": 9, "normalize": True, "lambda": 0.8}
    given = recipe(
        f"dare_{combine}", {"weight": 1}, {"weight": 2}, base_model="base", parameters=shared
    )
    expected = merge_dare(
        base(), [changed(1), changed(2)], [1, 2], 0.4, False, combine, True, 0.8, 9
    )
    assert run(given, *LOADED) == bits_of(expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_recipe_leaves_out_has_the_default_of_the_function(method):
    needed = {"weight": 0.5, "density": 0.5}
    own = {name: needed[name] for name in METHODS[method].of_models}
    given = recipe(method, own, own)
    models, names = [changed(1), changed(2)], ["coder", "poet"]
    if METHODS[method].base:
        given["base_model"] = "base"
        names.append("base")
    if method == "slerp":
        given["parameters"] = {"t": 0.5}
    expected = {
        "linear": lambda: merge_linear(models, [0.5, 0.5]),
        "slerp": lambda: merge_slerp(*models, 0.5),
        "karcher": lambda: merge_karcher(models, [0.5, 0.5]),
        "task_arithmetic": lambda: merge_task_arithmetic(base(), models, [0.5, 0.5]),
        "ties": lambda: merge_ties(base(), models, [0.5, 0.5], 0.5),
        "dare_linear": lambda: merge_dare(base(), models, [0.5, 0.5], 0.5),
        "dare_ties": lambda: merge_dare(base(), models, [0.5, 0.5], 0.5, combine="ties"),
    }
    assert run(given, *names) == bits_of(expected[method]())


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """Two directories, and a third of another function."""
    folder = tmp_path_factory.mktemp("presets")
    first = with_noise(small(**DENSE), 1)
    first.save_to_preset(folder / "first")
    with_noise(first, 2).save_to_preset(folder / "second")
    small(**{**DENSE, "rope_theta": 5.0}).save_to_preset(folder / "third")
    return folder


@pytest.mark.parametrize("kind", ["json", "yaml", "yml"])
def test_files_and_directories(presets, tmp_path, kind):
    yaml = pytest.importorskip("yaml") if kind != "json" else json
    given = recipe("linear", {"weight": 1}, {"weight": 1}, dtype="bfloat16")
    for entry, name in zip(given["models"], ("first", "second")):
        entry["model"] = str(presets / name)
    path = tmp_path / f"recipe.{kind}"
    path.write_text(yaml.dumps(given) if kind == "json" else yaml.safe_dump(given))
    merged = merge_from_config(path, progress=False)
    assert isinstance(merged, Qwen3Next)
    assert merged.dtype_policy.name == "bfloat16"
    models = [
        Qwen3Next.from_preset(presets / name, dtype="bfloat16", progress=False)
        for name in ("first", "second")
    ]
    assert bits_of(merged) == bits_of(merge_linear(models, [1, 1]))


def test_a_merge_of_a_model_with_itself_computes_what_it_does_and_is_saved(presets, tmp_path):
    name = str(presets / "first")
    entries = [{"model": name, "parameters": {"weight": w}} for w in (1, 2)]
    merged = merge_from_config({"merge_method": "karcher", "models": entries}, progress=False)
    merged.save_to_preset(tmp_path / "merged")
    model = Qwen3Next.from_preset(name, progress=False)
    np.testing.assert_allclose(logits_once(merged, IDS), logits_once(model, IDS), rtol=0, atol=1e-5)
    again = Qwen3Next.from_preset(tmp_path / "merged", progress=False)
    assert bits_of(again) == bits_of(merged)


def test_classifiers(tmp_path):
    models = [small(Qwen3NextClassifier, **DENSE, num_labels=3) for _ in range(2)]
    for name, model in zip("ab", models):
        model.save_to_preset(tmp_path / name)
    given = {"merge_method": "linear", "parameters": {"weight": 1}}
    given["models"] = [{"model": str(tmp_path / name)} for name in "ab"]
    merged = merge_from_config(given, model_class=Qwen3NextClassifier, progress=False)
    assert bits_of(merged) == bits_of(merge_linear(models, [1, 1]))


@pytest.mark.parametrize(
    ("changes", "other", "word"),
    [
        ({}, "third", "rope_theta=5.0 instead of 10000.0"),
        ({"density": 0}, "second", "density[0]=0"),
        ({"weight": -1}, "second", "weights[0]=-1"),
        ({"weight": {"experts": 1, "*": 0}}, "second", "'experts'"),
        ({"seed": -1}, "second", "seed=-1"),
        ({"rescale": 1}, "second", "rescale=1"),
        ({"normalize": 1}, "second", "normalize=1"),
        ({"lambda": None}, "second", "scale=None"),
    ],
)
def test_all_is_checked_before_weights_are_read(presets, monkeypatch, changes, other, word):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Qwen3Next, "from_preset", read)
    given = {"merge_method": "dare_ties", "base_model": str(presets / "first")}
    given["models"] = [{"model": str(presets / other)}]
    given["parameters"] = {"weight": 1, "density": 0.5, **changes}
    refused(lambda: merge_from_config(given), word)
    ends = [{"model": str(presets / name)} for name in ("first", "second")]
    given = {"merge_method": "slerp", "models": ends, "parameters": {"t": 2}}
    refused(lambda: merge_from_config(given), "t=2")


def test_yaml_without_pyyaml_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "recipe.yaml"
    path.write_text("merge_method: linear\n")
    refused(lambda: merge_from_config(path), "PyYAML")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("recipe.yaml", "a: [", "not valid YAML"),
        ("recipe.yaml", "- a", "names and values"),
        ("recipe.yaml", "a: {b: 1, b: 2}", "['b'] more than once"),
        ("recipe.json", "{", "not valid JSON"),
        ("recipe.json", '{"a": {"b": 1, "b": 2}}', "['b'] more than once"),
        ("recipe.toml", "", ".json, .yaml or .yml"),
        ("recipe.json", None, "nothing of that name"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, text, word):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    refused(lambda: merge_from_config(path), word)


def test_a_name_may_replace_one_that_yaml_merges_in(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c}\n")
    assert read_recipe(path)["b"] == {"c": {"x": 2}}


OWN = {"weight": 1, "density": 0.5}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"slices": []}, "['slices']"),
        ({"merge_method": "della"}, "merge_method='della'"),
        ({"merge_method": None}, "merge_method=None"),
        ({"models": None}, "models=None"),
        ({"models": []}, "models=[]"),
        ({"models": ["coder"]}, "models[0]"),
        ({"models": [{"name": "coder"}]}, "['name']"),
        ({"models": [{"parameters": OWN}]}, "['model']"),
        ({"models": [{"model": 3}]}, "models[0].model"),
        ({"models": [{"model": "coder", "parameters": {"wieght": 1}}]}, "['wieght']"),
        ({"models": [{"model": "coder", "parameters": {"weight": 1}}]}, "'density'"),
        ({"models": [{"model": "coder", "parameters": {**OWN, "t": 0}}]}, "['t']"),
        ({"models": [{"model": "base"}]}, "another one than 'base'"),
        ({"models": [{"model": "nowhere", "parameters": OWN}]}, "['coder', 'poet']"),
        ({"parameters": {"int8_mask": True}}, "['int8_mask']"),
        ({"parameters": {"rescale": True}}, "['rescale']"),
        ({"parameters": [1]}, "parameters=[1]"),
        ({"parameters": {"normalize": "yes"}}, "normalize='yes'"),
        ({"parameters": {"lambda": "1"}}, "scale='1'"),
        ({"base_model": None}, "base_model=None"),
        ({"base_model": 3}, "base_model=3"),
        ({"merge_method": "linear"}, "not have a `base_model`"),
        ({"merge_method": "slerp", "parameters": {}}, "must have ['t']"),
        ({"merge_method": "slerp", "parameters": {"t": 1}}, "['density', 'weight']"),
        ({"dtype": 3}, "dtype=3"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ],
)
def test_wrong_recipes_are_refused(changes, word):
    given = recipe("ties", OWN, OWN, base_model="base")
    given |= changes
    if changes.get("merge_method") == "linear":
        for entry in given["models"]:
            entry["parameters"] = {"weight": 1}
    refused(lambda: merge_from_config(given, models=loaded(*LOADED)), word)


def test_slerp_takes_two_models():
    given = recipe("slerp", {}, {}, parameters={"t": 0.5})
    three = {**given, "models": [*given["models"], {"model": "base"}]}
    refused(lambda: merge_from_config(three, models=loaded(*LOADED)), "karcher")
    other = {**given, "base_model": "base"}
    refused(lambda: merge_from_config(other, models=loaded("coder", "poet")), "base_model='base'")


@pytest.mark.parametrize(
    ("filters", "word"),
    [
        ([{"filter": "mlp", "value": 1}], "without"),
        ([{"filter": "model.layers", "value": 1}, {"value": 0}], "layers"),
        ([{"filter": 3, "value": 1}], "a piece of a path"),
        ([{"filter": "mlp", "value": 1}, {"filter": "mlp", "value": 0}], "once"),
        ([{"filter": "mlp"}], "['value']"),
        ([{"value": 1, "part": "mlp"}], "['part']"),
        ([0.5, {"value": 1}], "t[1]="),
    ],
)
def test_wrong_filters_are_refused(filters, word):
    given = recipe("slerp", {}, {}, parameters={"t": filters})
    refused(lambda: merge_from_config(given, models=loaded("coder", "poet")), word)


def test_wrong_models_are_refused():
    given = recipe("linear", {"weight": 1}, {"weight": 1})
    refused(lambda: merge_from_config(given, models=loaded(*LOADED)), "base")
    refused(lambda: merge_from_config(given, models={"coder": 3, "poet": base()}), "coder")
    refused(lambda: merge_from_config(given), "preset")
    models = loaded("coder", "poet")
    refused(lambda: merge_from_config(given, models=models, model_class=dict), "model_class")
    refused(lambda: merge_from_config(given, models=[base()]), "`models`")
