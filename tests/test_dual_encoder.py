"""Dual encoders of every kind embed as plain transformers does; what cannot be embedded rightly is refused."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import WORDS, drawn_image
from safetensors.torch import load_file, save_file
from test_models import small
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from align_train.corpus.images import Unusable, decode
from align_train.hub import DualEncoder, export_hf, load_dual_encoder, weights_digest

IMAGES = [drawn_image(number, size, "PNG") for number, size in enumerate([(70, 50), (40, 90), (32, 32), (33, 61)])]
CAPTIONS = ["a red cat", "Two DOGS", "moon", "green tree " * 60]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": 32, "width": 32}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def bert_tokenizer(folder, limit):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.txt").write_text("\n".join(words))
    return BertTokenizer(vocab=str(folder / "words.txt"), do_lower_case=True, model_max_length=limit)


def clip_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)


def siglip_tokenizer(lower_case=True):
    words = ["<pad>", "</s>", "<unk>", *WORDS, *LETTERS, "two", "dogs", "moon", "Two", "DOGS"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if lower_case:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=12,
        model_input_names=["input_ids"],
    )


def align(folder):
    config = AlignConfig(
        text_config={**SMALL, "vocab_size": 70, "max_position_embeddings": 80},
        vision_config={"width_coefficient": 0.1, "depth_coefficient": 0.2, "image_size": 32, "hidden_dim": 32},
        projection_dim=32,
    )
    image = EfficientNetImageProcessorPil(
        size={"height": 40, "width": 40}, resample=2, do_center_crop=True, crop_size=SQUARE, rescale_factor=1 / 127.5,
        rescale_offset=True, do_normalize=False, include_top=False,
    )  # fmt: skip
    return AlignModel(config), AlignProcessor(image, bert_tokenizer(folder, 10**30))


def clip(folder, **text):
    tower = {**SMALL, "vocab_size": 514, "max_position_embeddings": 24, "bos_token_id": 512, "eos_token_id": 513}
    config = CLIPConfig(
        text_config={**tower, **text},
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    return CLIPModel(config), CLIPProcessor(image, clip_tokenizer())


def old_clip(folder):
    """OpenAI's own configs say 2, for the highest id."""
    return clip(folder, eos_token_id=2)


def siglip(folder, tokenizer=None):
    tokenizer = tokenizer or siglip_tokenizer()
    tower = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    config = SiglipConfig(
        text_config={**tower, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 1},
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
    )
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer)


def vision_text(folder):
    text = BertConfig(**SMALL, vocab_size=70, max_position_embeddings=20)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**SMALL, image_size=32, patch_size=16), text, projection_dim=24
    )
    processor = VisionTextDualEncoderProcessor(ViTImageProcessorPil(size=SQUARE), bert_tokenizer(folder, 20))
    return VisionTextDualEncoderModel(config), processor


def vision_text_of_clip(folder):
    """CLIP's image tower beside BERT, as clip-italian."""
    text = BertConfig(**SMALL, vocab_size=70, max_position_embeddings=20)
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=16)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    return VisionTextDualEncoderModel(config), VisionTextDualEncoderProcessor(image, bert_tokenizer(folder, 20))


def saved(make, folder):
    """A model of random weights, far enough from their start that inputs matter, and its processor."""
    torch.manual_seed(0)
    model, processor = make(folder.parent / "words")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        for name, statistic in model.named_buffers():
            if name.endswith("running_var"):
                statistic.uniform_(0.3, 0.6)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


# captions are cut at the last, and padded to the longest or to that
KINDS = [(align, 64), (clip, 24), (old_clip, 24), (siglip, 12), (vision_text, 20), (vision_text_of_clip, 20)]


@pytest.mark.parametrize(("make", "limit"), KINDS)
@torch.inference_mode()
def test_it_embeds_as_plain_transformers(tmp_path, make, limit):
    plain, processor = saved(make, tmp_path / "hf")
    padding = "max_length" if make is siglip else True
    inputs = processor(
        text=CAPTIONS,
        images=[decode(content) for content in IMAGES],
        return_tensors="pt",
        padding=padding,
        truncation=True,
        max_length=limit,
    )
    expected = plain(**inputs)

    encoder = load_dual_encoder(tmp_path / "hf")
    pixels = np.stack([encoder.inputs.image(content, "here") for content in IMAGES])
    ids, mask = encoder.inputs.text(CAPTIONS)
    image, text = encoder.encode_image(torch.from_numpy(pixels)), encoder.encode_text(ids, mask)

    assert isinstance(encoder, DualEncoder)
    assert not encoder.training
    assert pixels.dtype == np.float32
    assert pixels.shape == (4, 3, 32, 32)
    assert torch.equal(ids, inputs["input_ids"])
    assert ids.shape == mask.shape == (4, limit)
    for ours, theirs in ((image, expected.image_embeds), (text, expected.text_embeds)):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 1e-6
        assert (ours.norm(dim=1) - 1).abs().max() <= 1e-6
        assert torch.pdist(ours).min() > 1e-3  # no two inputs alike
    assert weights_digest(encoder) == weights_digest(plain)


@pytest.mark.parametrize(("make", "limit"), KINDS)
@torch.inference_mode()
def test_a_text_alone_embeds_as_among_longer_ones(tmp_path, make, limit):
    saved(make, tmp_path / "hf")
    encoder = load_dual_encoder(tmp_path / "hf")
    together = encoder.encode_text(*encoder.inputs.text(CAPTIONS))
    alone = torch.cat([encoder.encode_text(*encoder.inputs.text([caption])) for caption in CAPTIONS])
    assert (together - alone).abs().max() <= 1e-5


def test_facts_say_how_inputs_are_made(tmp_path):
    facts = {}
    for make in (align, clip, siglip):
        saved(make, tmp_path / make.__name__)
        facts[make] = load_dual_encoder(tmp_path / make.__name__).inputs.facts()
    assert facts[align] == {
        "processor": "EfficientNetImageProcessorPil",
        "size": {"height": 40, "width": 40},
        "crop": {"height": 32, "width": 32},
        "interpolation": "bilinear",
        "antialias": True,
        "mean": None,
        "std": None,
        "max_tokens": 64,
        "padding": "longest",
        "lower_case": False,
    }
    assert facts[clip]["size"] == {"shortest_edge": 32}
    assert facts[clip]["interpolation"] == "bicubic"
    assert facts[clip]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert facts[clip]["padding"] == "longest"
    assert facts[siglip]["crop"] is None
    assert facts[siglip]["padding"] == "max_length"
    assert facts[siglip]["max_tokens"] == 12
    assert facts[siglip]["lower_case"] is True
    assert json.loads(json.dumps(facts[clip])) == facts[clip]


def test_texts_of_siglip_are_lower_cased_where_its_tokenizer_does_not(tmp_path):
    """SigLIP 2 comes with Gemma's tokenizer, which keeps capitals."""
    saved(lambda folder: siglip(folder, siglip_tokenizer(lower_case=False)), tmp_path / "hf")
    inputs = load_dual_encoder(tmp_path / "hf").inputs
    assert torch.equal(inputs.text(["Two DOGS"])[0], inputs.text(["two dogs"])[0])


def test_several_threads_make_the_images_that_one_makes(tmp_path):
    saved(clip, tmp_path / "hf")
    inputs = load_dual_encoder(tmp_path / "hf").inputs
    one = [inputs.image(content, "here") for content in IMAGES * 8]
    with ThreadPoolExecutor(4) as threads:
        several = list(threads.map(inputs.image, IMAGES * 8))
    assert all(np.array_equal(a, b) for a, b in zip(one, several, strict=True))


def test_a_broken_image_is_unusable_by_name(tmp_path):
    saved(clip, tmp_path / "hf")
    inputs = load_dual_encoder(tmp_path / "hf").inputs
    with pytest.raises(Unusable, match=r"corrupt_image: set/7\.jpg"):
        inputs.image(IMAGES[0][:100], "set/7.jpg")


def test_weights_in_half_precision_are_loaded_in_full(tmp_path):
    model, _ = saved(clip, tmp_path / "hf")
    model.half().save_pretrained(tmp_path / "hf")
    encoder = load_dual_encoder(tmp_path / "hf")
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    assert weights_digest(encoder) == weights_digest(model.float()) != weights_digest(model.half())


# Our own models


@pytest.fixture(scope="module")
def ours():
    return small(text={"vocabulary": 30_522}).eval()


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "hf"
    export_hf(ours, folder)
    return folder


@torch.inference_mode()
def test_an_export_embeds_as_our_model_and_has_its_digest(ours, exported):
    encoder = load_dual_encoder(str(exported))
    pixels = torch.from_numpy(np.stack([encoder.inputs.image(content, "here") for content in IMAGES]))
    ids, mask = encoder.inputs.text(CAPTIONS)
    assert ids.shape == (4, ours.preprocessing.max_tokens)
    assert (encoder.encode_image(pixels) - ours.encode_image(pixels)).abs().max() <= 1e-5
    assert (encoder.encode_text(ids, mask) - ours.encode_text(ids, mask)).abs().max() <= 1e-5
    assert weights_digest(encoder) == weights_digest(ours) == weights_digest(AlignModel.from_pretrained(exported))


def test_the_digest_sees_every_bit_name_shape_and_type():
    def digest(**tensors):
        module = nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return weights_digest(module)

    value = torch.arange(4.0)
    nudged = torch.nextafter(value, torch.tensor(9.0))
    changed = [
        {"a": nudged}, {"b": value}, {"a": value.reshape(2, 2)}, {"a": value.view(torch.int32)},
        {"a": value, "b": value},
    ]  # fmt: skip
    assert len({digest(a=value), *(digest(**tensors) for tensors in changed)}) == 6
    assert digest(a=value, b=nudged) == digest(b=nudged, a=value) != digest(a=nudged, b=value)
    assert len(digest(a=value)) == 64
    image = torch.rand(2, 3, 4, 4)
    assert digest(a=image) == digest(a=image.contiguous(memory_format=torch.channels_last))


def test_the_digest_leaves_out_what_is_not_saved():
    module = nn.Linear(2, 2)
    before = weights_digest(module)
    module.register_buffer("scratch", torch.rand(3), persistent=False)
    assert weights_digest(module) == before


# What is refused


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "hf"
    saved(clip, folder)
    return folder


@pytest.fixture
def copied(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "copied")


def changed(path, **values):
    document = json.loads(path.read_text())
    for key, value in values.items():
        node, _, name = key.rpartition("__")
        (document[node] if node else document)[name] = value
    path.write_text(json.dumps(document))


def test_another_kind_of_model(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    expected = "holds a 'bert' model: only those of type align, clip, siglip, vision-text-dual-encoder can be loaded"
    with pytest.raises(ValueError, match=expected):
        load_dual_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no model"):
        load_dual_encoder(tmp_path)


def test_neither_a_folder_nor_a_repository(tmp_path):
    for folder in (tmp_path / "none", "runs/hf"):
        with pytest.raises(OSError, match=f"{folder} is neither a folder with a model nor a repository within reach"):
            load_dual_encoder(folder)


def test_missing_weights(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, the first is text_projection\.weight"):
        load_dual_encoder(copied)


def test_weights_of_another_shape_or_cut_off(copied):
    weights = load_file(copied / "model.safetensors")
    weights["text_projection.weight"] = weights["text_projection.weight"][:, :5].clone()
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"broken or do not fit its config\.json"):
        load_dual_encoder(copied)
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"broken or do not fit its config\.json"):
        load_dual_encoder(copied)


def test_pickled_weights(copied):
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_dual_encoder(copied)


def test_a_folder_without_image_processor(copied):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copied / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"the image processor of .* cannot be loaded"):
        load_dual_encoder(copied)


def test_a_folder_without_tokenizer(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(ValueError, match=r"the tokenizer of .* has 2 tokens, but the model was trained with 514"):
        load_dual_encoder(copied)


def test_code_of_the_repository_is_not_run(copied):
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(copied)
    (copied / "processor_config.json").unlink(missing_ok=True)
    changed(copied / "config.json", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"})
    changed(copied / "preprocessor_config.json", auto_map={"AutoImageProcessor": "mine.Mine"})
    changed(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]})
    (copied / "mine.py").write_text("raise SystemExit('this must not run')")
    assert type(load_dual_encoder(copied).model) is CLIPModel


def test_a_tokenizer_of_another_size(copied):
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(copied)
    with pytest.raises(ValueError, match="has 515 tokens, but the model was trained with 514"):
        load_dual_encoder(copied)


def test_an_end_of_text_that_the_tokenizer_does_not_write(copied):
    changed(copied / "config.json", text_config__eos_token_id=7)
    expected = "would not pool at the end of texts: eos_token_id of its text_config is 7, but the tokenizer ends .* 513"
    with pytest.raises(ValueError, match=expected):
        load_dual_encoder(copied)


def test_a_padding_token_above_the_end_of_text_in_an_old_config(tmp_path):
    saved(lambda folder: clip(folder, eos_token_id=2, vocab_size=515), tmp_path / "hf")
    tokenizer = clip_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"would not pool at the end of texts: .* is 2, .* with 513 and pads with 514"):
        load_dual_encoder(tmp_path / "hf")


def test_images_of_several_sizes(copied):
    CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(copied)
    (copied / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"inputs of shapes \[\(1, 3, 32, 64\), \(1, 3, 64, 32\)\]: images of one size"
    ):
        load_dual_encoder(copied)
