"""How many parameters each public model and layer has, by name; the table is complete."""

import jax
import pytest
from flax import nnx
from layers import LAYERS

from jaxattn import models, nn

ATTENTION, SASA = {"mix": "attention"}, {"mix": "attention", "stem_mix": "attention"}
TABLE = [
    # torchvision's counts
    (models.resnet18, {}, 11_689_512),
    (models.resnet34, {}, 21_797_672),
    (models.resnet50, {}, 25_557_032),
    # Ramachandran et al. 2019 give 18.0 M for both; their tables leave out what no query of a window of 7 reads
    (models.resnet50, ATTENTION, 18_061_288),
    (models.resnet50, SASA, 18_053_128),
    (models.resnet18, ATTENTION, 4_415_784),
    (models.resnet34, ATTENTION, 7_838_376),
    # stem, three blocks of each stage, head: the CIFAR networks of He et al. (ResNet-20: 0.27 M), with projections
    (models.ResNet, {"stage_sizes": (3, 3, 3), "block": "basic", "width": 16}, 272_474),
    (models.tiny, {}, 77_290),
    (models.tiny, ATTENTION, 29_866),
    # the counts of the trained files, whose names and shapes are read strictly
    (models.efficientnet_lite0, {}, 4_652_008),
    # timm's
    (models.efficientnet_lite1, {}, 5_416_680),
    (models.efficientnet_lite2, {}, 6_092_072),
    (models.efficientnet_lite3, {}, 8_197_096),
    (models.efficientnet_lite4, {}, 13_006_568),
    (models.convnext_atto, {}, 3_695_520),
    (models.convnext_atto, {"version": 2}, 3_708_400),
    (models.convnext_femto, {}, 5_217_784),
    (models.convnext_femto, {"version": 2}, 5_233_240),
    (models.convnext_pico, {}, 9_045_672),
    (models.convnext_pico, {"version": 2}, 9_066_280),
    (models.convnext_nano, {}, 15_593_560),
    (models.convnext_nano, {"version": 2}, 15_623_800),
    (models.convnext_tiny, {}, 28_589_128),
    (models.convnext_tiny, {"version": 2}, 28_635_496),
    (models.convnext_small, {}, 50_223_688),
    (models.convnext_base, {}, 88_591_464),
    (models.convnext_base, {"version": 2}, 88_717_800),
    (models.convnext_large, {}, 197_767_336),
    (models.convnext_large, {"version": 2}, 197_956_840),
    (models.convnext_xlarge, {}, 350_196_968),
    (models.convnext_huge, {}, 660_289_640),
    # patches and norm; a stage of one block (γ of its own), a last norm, and a head
    (
        models.ConvNeXt,
        {"depths": (1,), "widths": (8,), "num_classes": 3},
        (49 * 8 + 16) + (50 * 8 + 16 + 9 * 32 + 33 * 8 + 8) + 16 + 27,
    ),
    # timm's
    (models.swin_tiny, {}, 28_288_354),
    (models.swin_small, {}, 49_606_258),
    (models.swin_base, {}, 87_768_224),
    (models.swin_base, {"window": 12, "image_size": 384}, 87_903_584),
    (models.swin_large, {}, 196_532_476),
    (models.swin_large, {"window": 12, "image_size": 384}, 196_735_516),
    (models.swinv2_tiny, {}, 28_347_154),
    (models.swinv2_small, {"window": 16}, 49_728_418),
    (models.swinv2_base, {}, 87_918_816),
    (models.swinv2_base, {"window": 12, "image_size": 192, "num_classes": 21841}, 109_280_841),
    (models.swinv2_large, {"num_classes": 21841}, 228_772_549),
    # patches and norm; a block of four maps and 2 · 3² offsets in a window of 2, an MLP and two norms; norm and head
    (
        models.Swin,
        {"depths": (1,), "width": 8, "num_heads": (2,), "window": 2, "num_classes": 3},
        (49 * 8 + 16) + (4 * 72 + 18 + 9 * 32 + 33 * 8 + 32) + 16 + 27,
    ),
    # the authors give 20, 28, 51, 90 M, and for DiNAT's large 200 M
    (models.nat_mini, {}, 19_984_174),
    (models.nat_tiny, {}, 27_901_582),
    (models.nat_small, {}, 50_743_297),
    (models.nat_base, {}, 89_769_652),
    (models.dinat_mini, {}, 19_984_174),
    (models.dinat_tiny, {}, 27_901_582),
    (models.dinat_small, {}, 50_743_297 - 2 * (3 * 96 + 4 * 192 + 18 * 384 + 5 * 768)),
    (models.dinat_base, {}, 89_769_652 - 2 * (3 * 128 + 4 * 256 + 18 * 512 + 5 * 1024)),
    (models.dinat_large, {}, 200_943_514),
    # a stem of 3·9·4 + 4 and 4·9·8 + 8, and a norm; a block of four maps, 2 · 5² offsets, an MLP, norms; norm and head
    (
        models.NAT,
        {"depths": (1,), "width": 8, "num_heads": (2,), "window": 3, "num_classes": 3},
        (112 + 296 + 16) + (4 * 72 + 50 + 9 * 24 + 25 * 8 + 32) + 16 + 27,
    ),
    # timm's
    (models.deit3_small, {}, 22_059_496),
    (models.deit3_medium, {}, 38_849_512),
    (models.deit3_base, {}, 86_585_320),
    (models.deit3_large, {}, 304_374_760),
    (models.deit3_huge, {}, 632_126_440),
    (models.dinov2_small, {}, 22_056_192),
    (models.dinov2_base, {}, 86_579_712),
    (models.dinov2_large, {}, 304_367_616),
    (models.dinov2_small, {"registers": 4}, 22_057_344),
    (models.dinov2_base, {"registers": 4}, 86_582_016),
    (models.dinov2_large, {"registers": 4}, 304_370_688),
    (models.clip_b32, {}, 87_849_728),
    (models.clip_b16, {}, 86_193_152),
    (models.clip_l14, {}, 303_966_976),
    (models.siglip_b16, {}, 92_884_224),
    (models.siglip_l16, {}, 315_956_224),
    (models.siglip_so400m, {}, 427_680_704),
    # timm's
    (models.maxvit_tiny, {}, 30_916_528),
    (models.maxvit_small, {}, 68_927_956),
    (models.maxvit_base, {}, 119_467_708),
    (models.maxvit_large, {}, 211_785_560),
    (models.MaxViT, {"depths": (2, 2, 5, 2), "widths": (64, 128, 256, 512)}, 30_916_528),
    (models.coatnet_0, {}, 27_435_562),
    (models.coatnet_1, {}, 41_721_502),
    (models.coatnet_2, {}, 73_868_400),
    (models.CoAtNet, {"depths": (2, 3, 7, 2), "widths": (96, 192, 384, 768)}, 27_435_562),
    (models.botnet26t, {}, 12_488_672),
    (models.halonet26t, {}, 12_480_288),
    (models.halonet50ts, {}, 22_733_280),
    (models.lambda_resnet26t, {}, 10_958_272),
    (models.lambda_resnet50ts, {}, 21_536_832),
    (
        models.BoTNet,
        {
            "depths": (2, 2, 2, 2),
            "widths": (256, 512, 1024, 2048),
            "mixed": ((), (), (1,), (0, 1)),
            "num_heads": (4,) * 4,
        },
        12_488_672,
    ),
    (models.poolformer_s12, {}, 11_915_176),
    (models.poolformer_s12, {"version": 2}, 11_891_712),
    (models.poolformer_s24, {}, 21_388_968),
    (models.poolformer_s24, {"version": 2}, 21_341_464),
    (models.poolformer_s36, {}, 30_862_760),
    (models.poolformer_s36, {"version": 2}, 30_791_216),
    (models.poolformer_m36, {}, 56_172_520),
    (models.poolformer_m36, {"version": 2}, 56_077_168),
    (models.poolformer_m48, {}, 73_473_448),
    (models.poolformer_m48, {"version": 2}, 73_346_056),
    (models.convformer_s18, {}, 26_774_448),
    (models.convformer_s36, {}, 40_012_152),
    (models.convformer_m36, {}, 57_051_640),
    (models.convformer_b36, {}, 99_882_616),
    (models.caformer_s18, {}, 26_341_656),
    (models.caformer_s36, {}, 39_297_102),
    (models.caformer_m36, {}, 56_204_878),
    (models.caformer_b36, {}, 98_753_614),
    (models.convmixer_768_32, {}, 21_110_248),
    (models.convmixer_1024_20, {}, 24_383_464),
    (models.convmixer_1536_20, {}, 51_625_960),
    (models.MetaFormer, {"depths": (2, 2, 6, 2), "widths": (64, 128, 320, 512)}, 11_891_712),
    (models.ConvMixer, {"width": 1536, "depth": 20}, 51_625_960),
    (models.volo_d1, {}, 26_632_040),
    (models.volo_d2, {}, 58_678_336),
    (models.volo_d3, {}, 86_325_072),
    (models.volo_d4, {}, 192_961_520),
    (models.volo_d5, {}, 295_455_584),
    (
        models.VOLO,
        {"depths": (4, 4, 8, 2), "widths": (192, 384, 384, 384), "num_heads": (6, 12, 12, 12)},
        26_632_040,
    ),
    (models.samvit_base, {}, 89_670_912),
    (models.swin_unetr_encoder, {}, 8_062_002),  # MONAI's count
    (
        models.SwinVolume,
        {"depths": (2,) * 4, "width": 48, "num_heads": (3, 6, 12, 24), "num_classes": 0, "in_features": 1},
        8_062_002,
    ),
    (models.samvit_large, {}, 308_278_272),
    (models.samvit_huge, {}, 637_026_048),
    (models.SAMViT, {"depths": (3,) * 4, "width": 768, "num_heads": 12, "num_classes": 0}, 89_670_912),
    (models.EfficientNet, {"num_classes": 10}, 4_652_008 - 990 * 1281),
    (models.DigitNet, {}, 390_410),
    # timm's counts; its ConViTs' positions have a bias for each head, which no softmax over them sees
    (models.vit_ti, {}, 5_717_416),
    (models.vit_s, {}, 22_050_664),
    (models.vit_b, {}, 86_567_656),
    (models.convit_ti, {}, 5_710_512 - 10 * 4),
    (models.convit_s, {}, 27_777_322 - 10 * 9),
    # Cordonnier et al. 2020 give 12.1 M: 9 value matrices and an output, 2 maps in the MLP, 2 norms, 9 heads' Δ and α
    (
        models.cordonnier,
        {},
        12 * 400 + 400 + 6 * (10 * 400**2 + 2 * 400 + 2 * 400 * 512 + 912 + 4 * 400 + 9 * 3) + 400 * 10 + 10,
    ),
    # patches and positions, 4 blocks, norm and head; without a class token
    (models.vit_tiny8, {}, 5 * 64 + 16 * 64 + 4 * (4 * (64**2 + 64) + 2 * 64 * 128 + 192 + 256) + 128 + 650),
    # and in each of 6 blocks the window's biases of 5² offsets in 4 heads
    (models.vit_small32, {"mix": "local"}, 6_272 + 8_192 + 6 * (66_048 + 65_920 + 512 + 100) + 256 + 1_290),
    (
        models.ViT,
        {
            "image_size": (4, 6),
            "patch_size": 2,
            "in_features": 1,
            "num_classes": 3,
            "width": 4,
            "depth": 1,
            "num_heads": 2,
            "mlp_dim": 8,
        },
        20 + 6 * 4 + 2 * 4 + 80 + 40 + 36 + 16 + 8 + 15,
    ),
    # patches of 64 voxels; 4 blocks of 4 maps, an MLP, 2 norms and 5³ offsets in 4 heads; norm and head
    (
        models.volume_small,
        {},
        65 * 96 + 4 * (4 * (96**2 + 96) + 2 * 96 * 192 + 288 + 4 * 96 + 500) + 192 + 970,
    ),
    (models.VolumeNet, {"in_features": 1, "num_classes": 2, "depth": 1}, 65 * 96 + 37_248 + 37_152 + 884 + 192 + 194),
    # 4·(8·8 + 8), and 2 heads' tables of 13² numbers, and of 13² or 2·13 rows of 4 or 2
    (nn.Attention, {"num_heads": 2, "in_features": 8}, 288),
    (nn.Attention, {"num_heads": 2, "in_features": 8, "window": (7, 7), "relative_bias": True}, 288 + 2 * 169),
    (nn.Attention, {"num_heads": 2, "in_features": 8, "window": (7, 7), "key_embedding": True}, 288 + 2 * 169 * 4),
    (nn.Attention, {"num_heads": 2, "in_features": 8, "window": (7, 7), "key_embedding": "shared"}, 288 + 169 * 4),
    (nn.Attention, {"num_heads": 2, "in_features": 8, "window": (7, 7), "key_embedding": "factorized"}, 288 + 104),
    (nn.Attention, {"num_heads": 2, "in_features": 8, "window": (7, 7), "key_embedding": "decomposed"}, 288 + 208),
    *((layer.module, *count) for layer in LAYERS.values() for count in layer.counts),
]


@pytest.mark.core(10)
@pytest.mark.parametrize(("make", "kwargs", "count"), TABLE, ids=lambda value: getattr(value, "__name__", None))
def test_count(make, kwargs, count):
    model = nnx.eval_shape(lambda: make(**kwargs, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


@pytest.mark.parametrize("package", [models, nn], ids=lambda package: package.__name__)
def test_the_table_is_complete(package):
    public = {name for name, value in vars(package).items() if callable(value) and not name.startswith("_")}
    assert public, f"{package.__name__} exports nothing"
    assert public <= {make.__name__ for make, _, _ in TABLE}
