"""Our classes in transformers' Auto classes, pipelines and models with a backbone, and in PEFT."""

from __future__ import annotations

import PIL.Image
import pytest
import torch
import transformers
from support import BOUNDS, randomise, relative_error

import convnext_fast

NEEDED = ("accelerate", "peft")
SIZES = {"num_stages": 4, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "num_labels": 3}
MAPS = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
AUTO = {
    "AutoModel": "ConvNextModel",
    "AutoModelForImageClassification": "ConvNextForImageClassification",
    "AutoBackbone": "ConvNextBackbone",
}


@pytest.fixture
def registered():
    """Our classes in place of transformers' own."""
    from transformers.models.auto.auto_factory import _LazyAutoMapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    maps = [getattr(transformers, auto)._model_mapping for auto in AUTO]
    maps.append(transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING)
    before = [dict(mapping._extra_content) for mapping in (CONFIG_MAPPING, *maps)]
    assert all(isinstance(mapping, _LazyAutoMapping) for mapping in maps)
    ours = dict.fromkeys(["pil", "torchvision"], convnext_fast.ConvNextImageProcessor.for_transformers())
    register = transformers.AutoImageProcessor.register
    register(convnext_fast.ConvNextConfig, image_processor_classes=ours, exist_ok=True)
    transformers.AutoConfig.register("convnext", convnext_fast.ConvNextConfig, exist_ok=True)
    for auto, name in AUTO.items():
        ours = getattr(convnext_fast, name)
        getattr(transformers, auto).register(convnext_fast.ConvNextConfig, ours, exist_ok=True)
    yield
    for mapping, content in zip((CONFIG_MAPPING, *maps), before, strict=True):
        mapping._extra_content.clear()
        mapping._extra_content.update(content)


@pytest.mark.filterwarnings("ignore:.*newly initialises:UserWarning")
@pytest.mark.parametrize("auto", AUTO)
def test_auto_classes(auto, registered, tmp_path):
    cls = getattr(convnext_fast, AUTO[auto])
    model = randomise(cls(convnext_fast.ConvNextConfig(**SIZES)))
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_labels=3)
    assert type(config) is convnext_fast.ConvNextConfig
    assert type(getattr(transformers, auto).from_config(config)) is cls
    if auto == "AutoBackbone":
        return
    for options in ({}, {"dtype": "float16"}, {"device_map": "cpu", "drop_path_rate": 0.25, "revision": "main"}):
        read = getattr(transformers, auto).from_pretrained(tmp_path, **options)
        assert type(read) is cls
        assert read.dtype == getattr(torch, options.get("dtype", "float32"))
        assert read.config.drop_path_rate == options.get("drop_path_rate", 0.0)
        assert all(torch.equal(t, model.state_dict()[n].to(t.dtype)) for n, t in read.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"backend": "pil"}, {"backend": "torchvision"}])
def test_auto_image_processor(options, registered, tmp_path):
    made = convnext_fast.ConvNextImageProcessor(size=40)
    made.save_pretrained(tmp_path)
    convnext_fast.ConvNextConfig().save_pretrained(tmp_path)
    read = transformers.AutoImageProcessor.from_pretrained(tmp_path, **options)
    assert type(read) is convnext_fast.ConvNextImageProcessor
    assert read == made


def upernet(backbone):
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=16, auxiliary_channels=8
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mask2former(backbone):
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 4}
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = transformers.Mask2FormerConfig(backbone_config=backbone, **sizes, **widths, dim_feedforward=16)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr(backbone):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **sizes, **heads))


def maskformer(backbone):
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    decoder = transformers.DetrConfig(d_model=16, encoder_layers=1, decoder_layers=1, num_queries=4)
    config = transformers.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder.to_dict(), **sizes)
    return transformers.MaskFormerForInstanceSegmentation(config)


@pytest.mark.parametrize("make", [upernet, mask2former, detr, maskformer])
def test_models_with_a_backbone(make, registered, tmp_path):
    ours = randomise(make(convnext_fast.ConvNextConfig(**SIZES, **MAPS))).eval()
    backbones = [m for m in ours.modules() if type(m) is convnext_fast.ConvNextBackbone]
    assert len(backbones) == 1
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused = ours(x)
        backbones[0].fused = False
        plain = ours(x)
        backbones[0].fused = True
    assert relative_error(fused[0], plain[0]) <= 1e-4
    ours.save_pretrained(tmp_path)
    read = type(ours).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative_error(read(x)[0], fused[0]) <= 1e-4


def test_pipelines():
    model = randomise(convnext_fast.ConvNextForImageClassification(convnext_fast.ConvNextConfig(**SIZES))).eval()
    processor = convnext_fast.ConvNextImageProcessor(size={"shortest_edge": 32})
    image = PIL.Image.new("RGB", (40, 50), (10, 200, 30))
    found = transformers.pipeline("image-classification", model=model, image_processor=processor)(image)
    assert {each["label"] for each in found} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    extract = transformers.pipeline("image-feature-extraction", model=model.convnext, image_processor=processor)
    assert torch.tensor(extract(image)).shape == (1, 20, 1, 1)


def adapters():
    import peft

    linear = {"target_modules": ["pwconv1", "pwconv2"]}
    return {
        "LoRA": peft.LoraConfig(r=2, init_lora_weights=False, **linear),
        "DoRA": peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **linear),
        "IA3": peft.IA3Config(feedforward_modules=["pwconv2"], init_ia3_weights=False, **linear),
        "LN tuning": peft.LNTuningConfig(target_modules=["layernorm"]),
    }


@pytest.mark.filterwarnings("ignore:.*calls its layers one by one:RuntimeWarning")
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "LN tuning"])
def test_adapters(kind):
    import peft

    results = []
    for library in (transformers, convnext_fast):
        model = randomise(library.ConvNextForImageClassification(library.ConvNextConfig(**SIZES))).eval().double()
        tuned = randomise(peft.get_peft_model(model, adapters()[kind]))
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        out = tuned(pixel_values=x, labels=torch.tensor([0, 2]))
        results.append({"logits": out.logits, "loss": out.loss, **_trained(tuned, out.logits)})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert relative_error(results[1][name], value) <= BOUNDS[torch.float64], name


def _trained(model, logits):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))
    return dict(zip(names, torch.autograd.grad(logits, parameters, weights), strict=True))


def test_adding_an_adapter_names_peft():
    model = convnext_fast.ConvNextModel(convnext_fast.ConvNextConfig(**SIZES))
    with pytest.raises(NotImplementedError, match=r"use peft\.get_peft_model"):
        model.add_adapter(adapters()["LoRA"])
