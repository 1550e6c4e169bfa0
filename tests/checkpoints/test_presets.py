"""Presets: folders and hub names, with whatever configuration and head."""

import json
import shutil
import sys
import tracemalloc

import keras
import pytest

from qwen3_next import (
    MTPConfig,
    Qwen3Next,
    Qwen3NextClassifier,
    Qwen3NextConfig,
    pad,
    transfer_qwen3_to_hybrid,
)
from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from tests.support.published import (
    SMALLEST,
    assert_same_weights,
    load,
    published,
    save,
    weights,
)
from tests.support.small_models import ONE_LAYER, small


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_preset_gives_the_same_bits_and_configuration(
    checkpoint, checkpoint_weights, tmp_path, shard
):
    model = load(checkpoint, dropout=0.25, gradient_checkpointing=True)
    model.save_to_preset(tmp_path, max_shard_size=shard)
    again = load(tmp_path)
    assert (again.config, again.gradient_checkpointing) == (model.config, True)
    assert_same_weights(weights(again), checkpoint_weights)
    assert load(tmp_path, rope_theta=5.0).config.rope_theta == 5.0


def test_preset_holds_what_no_published_type_can(tmp_path):
    config = Qwen3NextConfig(**config_from_hugging_face(published(SMALLEST)[0]))
    model = Qwen3Next(config.replace(normalization_type="rms_norm", ffn_type="geglu"))
    with pytest.raises(ValueError, match="attention_type='gated_attention'"):
        model.export_to_transformers(tmp_path / "published")
    assert not (tmp_path / "published").exists()
    model.save_to_preset(tmp_path / "own")
    assert_same_weights(weights(load(tmp_path / "own")), weights(model))


def test_bfloat16_preset_keeps_every_dtype(checkpoint, tmp_path):
    model = load(checkpoint, dtype="bfloat16")
    model.save_to_preset(tmp_path)
    again = load(tmp_path)
    assert again.dtype_policy.name == "bfloat16"
    assert_same_weights(weights(again), weights(model))


def test_language_model_becomes_a_classifier(checkpoint, checkpoint_weights, tmp_path):
    load(checkpoint).save_to_preset(tmp_path)
    for folder, head in ((checkpoint, "lm_head.weight"), (tmp_path, "lm_head/kernel")):
        model = load(folder, Qwen3NextClassifier, num_labels=3)
        assert model.coverage_report.initialised == ("score/kernel",)
        assert list(model.coverage_report.unused) == [head]
        loaded = weights(model)
        del loaded["score/kernel"]
        backbone = {k: v for k, v in checkpoint_weights.items() if k != "lm_head/kernel"}
        assert_same_weights(loaded, backbone)


def test_classifier_survives_both_formats(checkpoint, tmp_path):
    model = load(checkpoint, Qwen3NextClassifier, num_labels=3)
    model.save_to_preset(tmp_path / "own")
    model.export_to_transformers(tmp_path / "published")
    for folder in ("own", "published"):
        again = load(tmp_path / folder, Qwen3NextClassifier)
        assert again.coverage_report.initialised == ()
        assert_same_weights(weights(again), weights(model))
    fields = json.loads((tmp_path / "published" / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3NextForSequenceClassification"]


@pytest.mark.parametrize("given", [{}, {"pad_token_id": 5}])
def test_the_padding_token_of_a_classifier_survives_every_format(given, tmp_path):
    config, tensors = published(SMALLEST)
    first = save(tmp_path / "first", {**config, "pad_token_id": 7}, tensors)
    model = load(first, Qwen3NextClassifier, num_labels=3, **given)
    model.save_to_preset(tmp_path / "own")
    load(tmp_path / "own", Qwen3NextClassifier).export_to_transformers(tmp_path / "second")
    fields = json.loads((tmp_path / "second" / "config.json").read_text())
    assert fields["pad_token_id"] == given.get("pad_token_id", 7)
    assert load(tmp_path / "second", Qwen3NextClassifier).pad_token_id == fields["pad_token_id"]


def test_a_classifier_without_a_padding_token_is_exported_with_that_of_pad(checkpoint, tmp_path):
    model = load(checkpoint, Qwen3NextClassifier, num_labels=2)
    model.export_to_transformers(tmp_path)
    batch = pad([[1, 2, 3], [4]])
    assert (
        batch["token_ids"][1, 1]
        == json.loads((tmp_path / "config.json").read_text())["pad_token_id"]
    )


@pytest.mark.parametrize("wrong", [-1, 71, None, True])
def test_a_padding_token_is_a_token(wrong, checkpoint):
    with pytest.raises(ValueError, match=r"pad_token_id.* 0 to 70. Received"):
        load(checkpoint, Qwen3NextClassifier, num_labels=2, pad_token_id=wrong)


def test_the_number_of_classes_is_asked_for(checkpoint):
    with pytest.raises(ValueError, match="num_labels=None"):
        load(checkpoint, Qwen3NextClassifier)


class Unregistered(Qwen3Next):
    pass


@keras.saving.register_keras_serializable(package="tests")
class Widened(Qwen3Next):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = self.add_weight(name="bias", shape=(3,))


@keras.saving.register_keras_serializable(package="tests")
class Talkative(Qwen3Next):
    def get_config(self):
        return {**super().get_config(), "greeting": "hello"}


def with_lora():
    model = small(**ONE_LAYER)
    model.lm_head.enable_lora(2)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (with_lora, "lm_head/lora_kernel_a, lm_head/lora_kernel_b"),
        (lambda: small(Unregistered, **ONE_LAYER), "Unregistered"),
        (lambda: small(Widened, **ONE_LAYER), "bias"),
        (lambda: small(Talkative, **ONE_LAYER), "greeting"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(make, name, tmp_path):
    with pytest.raises(ValueError) as error:
        make().save_to_preset(tmp_path / "preset")
    assert name in str(error.value)
    assert not (tmp_path / "preset").exists()


def test_hub_presets_need_the_hub_client(monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"qwen3-next-keras\[hf\]"):
        load("hf://someone/something")


def test_hub_presets_are_downloaded(monkeypatch, checkpoint, checkpoint_weights):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "someone/something"
            return str(checkpoint)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert_same_weights(weights(load("hf://someone/something")), checkpoint_weights)


def test_directories_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config.json"):
        load(tmp_path)
    for text, word in (
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 1}', r"\['a'\] more than once"),
        ("[]", "model_type"),
        ('{"model_type": "llama"}', "llama"),
        ('{"registered_name": "nobody>Knows", "config": {}}', "nobody>Knows"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            load(tmp_path)


@pytest.mark.parametrize("own", [True, False], ids=["own", "published"])
@pytest.mark.parametrize("size", ["layers", "experts", "width"])
def test_nothing_is_allocated_for_sizes_that_the_files_do_not_have(own, size, checkpoint, tmp_path):
    if own:
        load(checkpoint).save_to_preset(tmp_path)
    else:
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    fields = saved["config"] if own else saved
    names = {"experts": "num_experts", "width": "hidden_size"}
    names["layers"] = "num_layers" if own else "num_hidden_layers"
    fields[names[size]] = 10**9
    fields.pop("layer_types", None)
    if own:
        fields["full_attention_interval"] = None
    path.write_text(json.dumps(saved))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"Received|instead of"):
        load(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("config", [{}, None, [], "text"])
def test_an_own_preset_without_its_configuration_is_damaged(config, checkpoint, tmp_path):
    load(checkpoint).save_to_preset(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": config}))
    with pytest.raises(ValueError, match="every field"):
        load(tmp_path)


def test_a_model_of_several_inputs_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_next", "text_config": {}}))
    with pytest.raises(ValueError, match="text_config"):
        load(tmp_path)


def test_a_frozen_backbone_learns_again_without_what_learned_beside_it(tmp_path):
    model = small(**ONE_LAYER, mtp=MTPConfig(), freeze_backbone=True)
    model.save_to_preset(tmp_path)
    assert load(tmp_path).freeze_backbone
    alone = load(tmp_path, mtp=None)
    assert not alone.freeze_backbone and alone.backbone.trainable_variables
    with pytest.raises(ValueError, match=r"`freeze_backbone` leaves nothing.*Received"):
        load(tmp_path, mtp=None, freeze_backbone=True)


def test_a_preset_keeps_the_counters_of_training(tmp_path):
    mtp = MTPConfig(num_predict_tokens=1, speculation_lookahead=1, warmup_steps=5)
    config = Qwen3NextConfig(**config_from_hugging_face(published(SMALLEST)[0]))
    model = Qwen3Next(config.replace(mtp=mtp))
    model.mtp_steps.assign(3)
    model.save_to_preset(tmp_path)
    assert int(load(tmp_path).mtp_steps.value) == 3


@pytest.mark.parametrize("door", [Qwen3Next.from_preset, transfer_qwen3_to_hybrid])
@pytest.mark.parametrize("progress", ["no", None, 1])
def test_progress_is_shown_or_not(door, progress):
    with pytest.raises(ValueError, match=r"`progress` must be a bool\. Received"):
        door("nowhere", progress=progress)
