"""``from_pretrained`` and ``save_pretrained`` with the options of transformers, beside transformers itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from support import randomise

import convnext_fast
from convnext_fast import ConvNextBackbone, ConvNextConfig, ConvNextForImageClassification, ConvNextModel

OLD = ("adapter_name", "anything_else", "_fast_init", "offload_buffers", "resume_download")
"""Options that transformers no longer takes."""
SIZES = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}


def their_model(**fields):
    return randomise(transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SIZES, **fields)))


def our_model(**fields):
    return randomise(ConvNextForImageClassification(ConvNextConfig(**SIZES, **fields)))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        {"revision": "main", "token": "hf_x", "local_files_only": True, "trust_remote_code": False},
        {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True, "device_map": "cpu"},
        {"device_map": {"": torch.device("cpu")}, "quantization_config": None, "attn_implementation": "eager"},
        {"force_download": False, "max_memory": None, "key_mapping": None, "anything_else": None},
        {"proxies": None, "resume_download": None, "_fast_init": True, "offload_buffers": False},
        {"adapter_name": "default", "generation_config": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_nothing(options, tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    for library in (transformers, convnext_fast):
        if library is transformers:  # which needs accelerate for it
            taken = {name: value for name, value in options.items() if name not in ("device_map", *OLD)}
        else:
            taken = options
        model = library.ConvNextForImageClassification.from_pretrained(tmp_path, **taken)
        assert same(model, theirs)
        assert not set(options) & set(model.config.to_dict())
        assert model.config.name_or_path == model.name_or_path == str(tmp_path)


def test_subfolder_and_variant(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "inner", variant="fp16")
    ours = ConvNextForImageClassification.from_pretrained(tmp_path, subfolder="inner", variant="fp16")
    assert same(ours, theirs)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors or"):
        ConvNextForImageClassification.from_pretrained(tmp_path, subfolder="inner")
    ours.save_pretrained(tmp_path / "ours", variant="fp16", max_shard_size="4KB")
    assert (tmp_path / "ours" / "model.safetensors.index.fp16.json").is_file()
    read = transformers.ConvNextForImageClassification.from_pretrained(tmp_path / "ours", variant="fp16")
    assert same(read, ours)


@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_pickles_and_safetensors(size, tmp_path):
    ours = our_model()
    ours.save_pretrained(tmp_path, max_shard_size=size)
    ours.save_pretrained(tmp_path, max_shard_size=size, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors*"))
    assert same(transformers.ConvNextForImageClassification.from_pretrained(tmp_path), ours)
    assert same(ConvNextForImageClassification.from_pretrained(tmp_path, use_safetensors=False), ours)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors or"):
        ConvNextForImageClassification.from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "auto"])
def test_dtypes_by_name(dtype, tmp_path):
    their_model().to(torch.float16).save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        theirs = transformers.ConvNextForImageClassification.from_pretrained(tmp_path, **{name: dtype})
        ours = ConvNextForImageClassification.from_pretrained(tmp_path, **{name: dtype})
        assert ours.dtype == theirs.dtype == ours.config.dtype == theirs.config.dtype
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(theirs.dtype)[6:]


def test_loading_info(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    for name, options in {
        "ConvNextForImageClassification": {"num_labels": 7, "ignore_mismatched_sizes": True},
        "ConvNextModel": {},
        "ConvNextBackbone": {"out_features": ["stage1", "stage2"]},
    }.items():
        expected, actual = (
            loaded(getattr(library, name), tmp_path, output_loading_info=True, **options)[1]
            for library in (transformers, convnext_fast)
        )
        actual["unexpected_keys"] = {key.removeprefix("convnext.") for key in actual["unexpected_keys"]}
        expected["unexpected_keys"] = {key.removeprefix("convnext.") for key in expected["unexpected_keys"]}
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert {*actual[key]} == {*expected[key]}, (name, key)
        assert not actual["error_msgs"]


@pytest.mark.filterwarnings("ignore:.*newly initialises:UserWarning")
def loaded(cls, source, **options):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(source, **options)


def test_a_stem_for_another_number_of_channels(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"patch_embeddings\.weight \(8, 3, 4, 4\), expected \(8, 1, 4, 4\)"):
        ours = ConvNextModel.from_pretrained(tmp_path, num_channels=1, ignore_mismatched_sizes=True)
    assert ours(torch.randn(1, 1, 32, 32)).pooler_output.shape == (1, 16)
    kept = theirs.convnext.embeddings.patch_embeddings.bias
    assert torch.equal(ours.embeddings.patch_embeddings.bias, kept)


@pytest.mark.parametrize("kind", ["ours", "theirs", "folder"])
def test_a_configuration_or_tensors_given(kind, tmp_path):
    theirs = their_model(drop_path_rate=0.5)
    theirs.save_pretrained(tmp_path)
    config = {"ours": ConvNextConfig(**SIZES), "theirs": theirs.config, "folder": str(tmp_path)}[kind]
    for source, state in ((tmp_path, None), (None, theirs.state_dict())):
        ours = ConvNextForImageClassification.from_pretrained(source, config=config, state_dict=state)
        assert same(ours, theirs)
        assert ours.config.drop_path_rate == (0.0 if kind == "ours" else 0.5)
    assert ours.classifier.weight.data_ptr() != theirs.classifier.weight.data_ptr()
    with pytest.raises(TypeError, match="source is None: expected"):
        ConvNextForImageClassification.from_pretrained(None, config=config)


def test_what_cannot_be_served_names_itself(tmp_path):
    our_model().save_pretrained(tmp_path)
    for options, error, message in [
        ({"quantization_config": {"bits": 4}}, ValueError, "quantization_config is .*does not support"),
        ({"weights_only": False}, ValueError, "weights_only is False"),
        ({"device_map": 1.5}, TypeError, "device_map is 1.5"),
        ({"device_map": "elsewhere"}, ValueError, "device is 'elsewhere'"),
        ({"device_map": {"": "meta"}}, ValueError, "device is meta"),
        ({"device": "meta"}, ValueError, "device is meta"),
        ({"drop_path_rates": 0.1}, TypeError, r"got drop_path_rates: .*is drop_path_rate meant"),
        ({"config": {"depths": [1]}}, TypeError, "config is a dict"),
    ]:
        with pytest.raises(error, match=message):
            ConvNextForImageClassification.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="device is meta"), torch.device("meta"):
        ConvNextForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        our_model().save_pretrained(tmp_path / "config.json")


def test_a_map_of_devices_needs_accelerate(tmp_path, monkeypatch):
    our_model().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="device_map='auto' needs accelerate"):
        ConvNextForImageClassification.from_pretrained(tmp_path, device_map="auto")


def test_saving_other_tensors_and_on_one_process(tmp_path):
    ours = our_model()
    doubled = {name: 2 * tensor for name, tensor in ours.state_dict().items()}
    ours.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    ours.save_pretrained(
        tmp_path, state_dict=doubled, save_function=torch.save, save_peft_format=True, save_original_format=True
    )
    read = transformers.ConvNextForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, doubled[name]) for name, tensor in read.state_dict().items())


def test_a_model_from_its_configuration():
    config = ConvNextConfig(**SIZES, dtype="float16")
    for made in (ConvNextBackbone._from_config(config), ConvNextBackbone._from_config(config, dtype="bfloat16")):
        assert made.dtype == made.config.dtype
    assert config.dtype == torch.float16


def test_upload(monkeypatch):
    seen, created = [], []

    class Api:
        def __init__(self, **options):
            seen.append(options)

        def create_repo(self, repo_id, **options):
            created.append(repo_id)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **options):
            seen.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), options["commit_message"]))
            assert options["commit_description"] == described

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(TypeError, match="shards"):
        our_model().push_to_hub("name", token="t", shards=3)
    assert not created
    seen.clear()
    described = "all of it"
    our_model().push_to_hub("name", token="t", commit_message="first", commit_description=described, variant="fp16")
    described = None
    convnext_fast.ConvNextImageProcessor().push_to_hub("name")
    assert seen[:2] == [{"token": "t"}, ("me/name", ["config.json", "model.fp16.safetensors"], "first")]
    assert seen[3] == ("me/name", ["preprocessor_config.json"], None)


@pytest.mark.parametrize("before", [None, "---\ntags:\n- mine\n---\n# A card\n"])
def test_tags_go_into_the_card(before, monkeypatch, tmp_path):
    cards = []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path, **_):
            path = Path(folder_path, "README.md")
            cards.append(path.read_text() if path.exists() else None)

    reason = huggingface_hub.errors.EntryNotFoundError("none")

    def download(repo_id, name, revision, **_):
        assert (repo_id, name, revision) == ("me/name", "README.md", "dev")
        if before is None:
            raise reason
        Path(tmp_path, name).write_text(before)
        return str(Path(tmp_path, name))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    our_model().push_to_hub("name", tags=["first", "mine"], revision="dev")
    our_model().push_to_hub("name")
    found = huggingface_hub.ModelCard(cards[0])
    assert found.data.tags == (["first", "mine"] if before is None else ["mine", "first"])
    assert before is None or found.text.strip() == "# A card"
    assert cards[1] is None
    with pytest.raises(TypeError, match="tags='first': expected a list of strings"):
        our_model().push_to_hub("name", tags="first")
    if before is None:  # a card that cannot be reached is not replaced
        reason = huggingface_hub.errors.LocalEntryNotFoundError("offline")
        with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
            our_model().push_to_hub("name", tags=["first"], revision="dev")
    assert len(cards) == 2


def test_members_that_callers_read(tmp_path):
    theirs = their_model().double()
    theirs.save_pretrained(tmp_path)
    ours = ConvNextForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for library, model in ((transformers, theirs), (convnext_fast, ours)):
        assert type(model.base_model) is library.ConvNextModel
        assert model.base_model.base_model is model.base_model
        assert len(model(x, output_attentions=True, output_hidden_states=True).hidden_states) == 3
        assert not model.can_generate()
        assert model(x, output_attentions=False).logits.shape == (2, 3)
    chosen = ours(x, output_hidden_states=[0, -1]).hidden_states  # transformers since 5.24, too
    assert [state is None for state in chosen] == [False, True, False]
    assert ours.config.num_hidden_layers == 2
    assert ours.get_memory_footprint() == theirs.get_memory_footprint() == sum(p.nbytes for p in ours.parameters())
    assert ours.device == theirs.device
    assert isinstance(ours, transformers.PreTrainedModel)
    assert isinstance(ours(x), transformers.utils.ModelOutput)


@pytest.mark.parametrize("kind", ["Model", "ForImageClassification", "Backbone", "new"])
def test_a_model_of_transformers_that_holds_ours_keeps_its_weights(kind, tmp_path):
    our_model().save_pretrained(tmp_path)
    if kind == "new":
        body = ConvNextForImageClassification(ConvNextConfig(**SIZES))
    elif kind == "Backbone":
        with pytest.warns(UserWarning, match="newly initialises"):
            body = ConvNextBackbone.from_pretrained(tmp_path)
    else:
        body = getattr(convnext_fast, f"ConvNext{kind}").from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}

    class Holder(transformers.PreTrainedModel):
        config_class = transformers.ConvNextConfig

        def __init__(self, config):
            super().__init__(config)
            self.body = body
            self.post_init()

    Holder(transformers.ConvNextConfig(**SIZES))
    body.init_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())


def test_saving_no_tensors(tmp_path):
    """For when another library writes the weights."""
    our_model().save_pretrained(tmp_path, state_dict={})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert "architectures" not in written


def test_a_subclass_in_the_style_of_transformers(tmp_path):
    class Mine(ConvNextForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            self.post_init()

    ours = our_model()
    ours.save_pretrained(tmp_path)
    assert same(Mine.from_pretrained(tmp_path), ours)

    class Around(ConvNextModel):
        def __init__(self, config):
            super().__init__(config)
            self.body = ConvNextForImageClassification.from_pretrained(tmp_path)
            self.post_init()

    assert same(Around(ours.config).body, ours)


@pytest.mark.parametrize("options", [{"use_fast": True}, {"use_fast": False}, {"proxies": None, "anything_else": None}])
def test_options_of_an_image_processor_that_change_nothing(options, tmp_path):
    made = convnext_fast.ConvNextImageProcessor(size=32)
    made.save_pretrained(tmp_path)
    assert convnext_fast.ConvNextImageProcessor.from_pretrained(tmp_path, **options) == made
