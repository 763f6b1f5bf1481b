"""A LLaVA and a Qwen2.5-VL, tiny and random, with their processors: one image per row, in the two layouts there are."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.drop_in.chats import CHAT_TEMPLATE, CHAT_VOCAB_SIZE, SPECIAL_TOKENS, chat_tokenizer


class QwenWithoutVideos(Qwen2_5_VLProcessor):
    """The video processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<image>", "<tool>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<tool>"])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def llava_processor():
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=chat_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )


def qwen_processor():
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, min_pixels=64, max_pixels=256
    )
    return QwenWithoutVideos(image_processor, chat_tokenizer(), chat_template=CHAT_TEMPLATE)


TEXT = {
    "vocab_size": CHAT_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
IMAGE_TOKEN_ID = SPECIAL_TOKENS.index("<image>")
LLAVA_VISION = ("model.vision_tower", "model.multi_modal_projector")


def llava(*frozen):
    """A vision tower of two blocks that gives four patches per image, a projector, and a language model of two blocks."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return freeze(LlavaForConditionalGeneration(config), frozen)


def qwen(*frozen):
    """A vision tower that flattens the patches of all images into its first axis, and a language model of two blocks."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 64,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=SPECIAL_TOKENS.index("<tool>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return freeze(Qwen2_5_VLForConditionalGeneration(config), frozen)


def freeze(model, names):
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model
