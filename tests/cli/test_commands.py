"""The command line: what it writes, and how it says no."""

import json

import numpy as np
import pytest

from qwen3_next import Qwen3Next
from qwen3_next.checkpoints import safetensors_files
from qwen3_next.cli import main
from tests.support.small_models import logits_once, random_ids
from tests.support.teachers import qwen3, weights_of

IDS = random_ids(4, 12)


@pytest.fixture
def folder(tmp_path):
    qwen3(num_layers=2).export_to_transformers(tmp_path / "qwen3")
    np.save(tmp_path / "tokens.npy", IDS)
    np.save(tmp_path / "none.npy", IDS[:0])
    np.savez(tmp_path / "several.npz", IDS)
    hybrid = {"deltanet_layer_pattern": [0], "pattern_period": 2}
    (tmp_path / "transfer.json").write_text(json.dumps({"hybrid_attention": hybrid}))
    return tmp_path


def run(*arguments):
    main([str(argument) for argument in arguments])


def loaded(directory):
    return Qwen3Next.from_preset(directory, progress=False)


def test_a_qwen3_is_converted_and_learns_from_itself(folder, capsys):
    options = ("--config", folder / "transfer.json", "--calibration", folder / "tokens.npy")
    run("convert", folder / "qwen3", folder / "hybrid", *options, "--format", "transformers")
    assert "from attention distance" in capsys.readouterr().out
    assert loaded(folder / "hybrid").get_layer_stats()["deltanet_layers"] == 1
    pair = (folder / "qwen3", folder / "hybrid")
    options = ("--tokens", folder / "tokens.npy", "--batch-size", 4, "--learning-rate", 1e-2)
    run("distill", *pair, folder / "better", *options, "--stage", "alignment", "--epochs", 3)

    expected = logits_once(loaded(folder / "qwen3"), IDS)

    def difference(name):
        return np.abs(logits_once(loaded(folder / name), IDS) - expected)

    assert difference("better").mean() < difference("hybrid").mean()


def test_models_are_merged_as_a_recipe_says(folder):
    models = [{"model": str(folder / "qwen3"), "parameters": {"weight": w}} for w in (0.25, 0.75)]
    (folder / "recipe.json").write_text(json.dumps({"merge_method": "linear", "models": models}))
    run("merge", folder / "recipe.json", folder / "merged")
    found, expected = (weights_of(loaded(folder / name)) for name in ("merged", "qwen3"))
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=1e-6)


PAIR, TOKENS = ("{}/qwen3", "{}/qwen3"), ("--tokens", "{}/tokens.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "{}/nowhere", "{}/out"), "`preset` must be a directory"),
        (("convert", "{}/qwen3", "{}/out", "--config", "{}/none.json"), "`--config` must be"),
        (("convert", "{}/qwen3", "{}/out", "--calibration", "{}/transfer.json"), ".npy file"),
        (("convert", "{}/qwen3", "{}/out", "--calibration", "{}/several.npz"), ".npy file"),
        (("distill", "{}/qwen3", "{}/qwen3", "{}/out", "--tokens", "{}/none"), ".npy file"),
        (("merge", "{}/none.json", "{}/out"), "none.json"),
        (("distill", *PAIR, "{}/out", "--tokens", "{}/none.npy"), "at least one"),
        (("distill", *PAIR, "{}/out", *TOKENS, "--epochs", "0"), "`epochs` must be"),
        (("distill", *PAIR, "{}/out", *TOKENS, "--seed", "-1"), "`seed` must be"),
        (
            ("distill", *PAIR, "{}/out", *TOKENS, "--stage", "alignment", "--temperature", "0"),
            "`temperature` is not for",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*(argument.format(folder) for argument in arguments))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{}/tokens.npy", "must not be a file"),
        ("{}/tokens.npy/out", "Not a directory"),
        ("{}/qwen3", "another directory than the sources"),
        ("{}/qwen3/../qwen3", "another directory than the sources"),
        ("", "must be a path"),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "{}/qwen3", "TARGET"),
        ("distill", *PAIR, "TARGET", *TOKENS),
        ("merge", "{}/recipe.json", "TARGET"),
    ],
)
def test_a_target_that_cannot_be_one_stops_the_command_before_its_work(
    folder, arguments, target, message, capsys, monkeypatch
):
    monkeypatch.setattr(Qwen3Next, "__init__", None)  # no model is made
    models = [{"model": f"{folder}/qwen3", "parameters": {"weight": 1}}] * 2
    (folder / "recipe.json").write_text(json.dumps({"merge_method": "linear", "models": models}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit:
        run(*(part.replace("TARGET", target).format(folder) for part in arguments))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_command_says_so_and_leaves_nothing(folder, capsys, monkeypatch):
    def interrupt(path, *arguments):
        path.write_bytes(b"half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_files, "_write_file", interrupt)
    models = [{"model": f"{folder}/qwen3", "parameters": {"weight": 1}}] * 2
    (folder / "recipe.json").write_text(json.dumps({"merge_method": "linear", "models": models}))
    with pytest.raises(SystemExit) as exit:
        run("merge", folder / "recipe.json", folder / "out")
    assert exit.value.code == 130
    assert capsys.readouterr().err == "qwen3-next: interrupted\n"
    assert not (folder / "out").exists()


def test_a_variant_is_described(capsys):
    run("describe", "80b_a3b")
    assert "79,674,391,296" in capsys.readouterr().out


def test_what_devices_hold_of_a_variant_is_described(capsys):
    run("describe", "80b_a3b", "--mesh", "data=2,expert=8")
    plain = capsys.readouterr().out
    assert "data=2,expert=8, 16 devices" in plain
    run("describe", "80b_a3b", "--mesh", "data=2,expert=8", "--fsdp")
    assert "data+expert" in capsys.readouterr().out and "data+expert" not in plain


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--mesh", "model=2"), "unknown axes"), (("--fsdp",), "`--fsdp` needs a `--mesh`")],
)
def test_a_mesh_that_is_none_ends_the_command(options, message, capsys):
    with pytest.raises(SystemExit):
        run("describe", "tiny", *options)
    assert message in capsys.readouterr().err
