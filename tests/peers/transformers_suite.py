"""transformers' common tests of models, configurations, backbones and image processors, for our classes.

`test_transformers_suite` copies this file to where those tests are, as a module of a model there, and runs it.
"""

import unittest

import transformers
from transformers.testing_utils import torch_device

import convnext_fast
from convnext_fast import ConvNextBackbone, ConvNextConfig, ConvNextForImageClassification, ConvNextModel

from ...test_backbone_common import BackboneTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

transformers.AutoConfig.register("convnext", ConvNextConfig, exist_ok=True)
transformers.AutoModel.register(ConvNextConfig, ConvNextModel, exist_ok=True)
transformers.AutoModelForImageClassification.register(ConvNextConfig, ConvNextForImageClassification, exist_ok=True)
transformers.AutoBackbone.register(ConvNextConfig, ConvNextBackbone, exist_ok=True)
PROCESSORS = {"pil": convnext_fast.ConvNextImageProcessor.for_transformers()}
transformers.AutoImageProcessor.register(ConvNextConfig, image_processor_classes=PROCESSORS, exist_ok=True)


class OurModels:
    """What the mix-ins need: a small configuration and its inputs."""

    batch_size, image_size, num_channels, num_labels, is_training = 5, 32, 3, 10, True
    hidden_sizes, depths = [10, 20, 30, 40], [1, 2, 1, 1]

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return ConvNextConfig(
            hidden_sizes=self.hidden_sizes,
            depths=self.depths,
            num_labels=self.num_labels,
            out_features=["stage2", "stage3", "stage4"],
        )

    def prepare_config_and_inputs(self):
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixels, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config, pixels, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixels}


class ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ConvNextModel, ConvNextForImageClassification, ConvNextBackbone)
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = OurModels(self)
        common = ["num_channels", "hidden_sizes"]
        self.config_tester = ConfigTester(
            self, ConvNextConfig, has_text_modality=False, common_properties=common, num_channels=4
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for cls in self.all_model_classes:
            states = cls(config).to(torch_device).eval()(**inputs, output_hidden_states=True).hidden_states
            assert [s.shape[-1] for s in states] == [8, 8, 4, 2, 1]

    test_inputs_embeds = test_model_get_set_embeddings = test_feed_forward_chunking = None


class BackboneTest(unittest.TestCase, BackboneTesterMixin):
    all_model_classes = (ConvNextBackbone,)
    config_class = ConvNextConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = OurModels(self)


class OurProcessor(ImageProcessingTester):
    def __init__(self, parent, **options):
        options.setdefault("size", {"shortest_edge": 20})
        super().__init__(parent, **options)

    def _get_image_processing_classes(self):
        return {"pil": convnext_fast.ConvNextImageProcessor}

    def expected_output_image_shape(self, images):
        return self.num_channels, 20, 20


class ProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = OurProcessor
    test_cast_dtype = True
